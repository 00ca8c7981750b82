"""Which numbers set the loader's speed and memory, in which unit, and where does each come from?

What the file format or the memory shared with the prefetch process fixes is not here, nor what a
user sets (TENSORSERVE_FETCH_CONNECTIONS, TENSORSERVE_HOST_MEMORY_LIMIT). The numbers of the
transport are in sources/tuning.py. "Guess" means that no measurement is kept for a number.
"""

from __future__ import annotations

from dataclasses import dataclass

from tensorserve.sources.tuning import DEFAULTS as TRANSPORT

_KIB = 1024
_MIB = 1024**2
_GIB = 1024**3


@dataclass(frozen=True)
class Tuning:
    """All of them. Sizes are bytes, times are seconds, unless a field says otherwise."""

    # Sizes of reads --------------------------------------------------------------------------

    part_bytes: int = 2 * _MIB
    """The longest range that is received at once, and a slot of a GPU's ring. tensorizer seals in
    chunks of this size (format/writer.py CHUNK_BYTES), so that a part is decrypted as a whole.
    `bench.gpu_sweep` varies it; not run on a GPU yet.
    """
    strip_bytes: int = _MIB
    """The longest range received into a thread's own buffer from a remote source. Divides
    `part_bytes`. Guess: the buffers of some 64 threads together stay in the L3 cache of a server.
    """
    job_bytes: int = 8 * _MIB
    """One request. Object stores keep pieces of 4 MiB, 8 MiB or more, and read whole pieces
    (SeaweedFS loses a third of its rate otherwise). At S3's 90 MB/s a connection it takes 90 ms,
    beside which the latency of a request is small.
    """
    most_job_bytes: int = 64 * _MIB
    """One request of a connection that brings that much in `long_job_seconds`: what Python does for
    a request is then an eighth of the work for each byte.
    """
    long_job_seconds: float = 1.0
    """A tensor at the begin of a long job is there so much earlier than the next job's. Guess."""
    long_job_share: int = 2
    """A job is longer than `job_bytes` only where a load has so many of them for each connection:
    a short load's tensors come one after the other. Guess.
    """
    short_job_bytes: int = 4 * _MIB
    """One request towards the end of a load, or where memory is scarce. Jobs of single parts
    doubled the requests without gain (docs/loader.md, "What did not help").
    """
    short_job_seconds: float = 0.5
    """Towards the end of a load, a job takes a connection so long where that is more. It bounds by
    how much one connection ends after the others, and no request is made for less. Guess.
    """
    job_room: float = 1.5
    """Jobs are short if the memory is less than this many times the size of all long jobs: a span
    that has arrived waits for those before it. Guess.
    """
    small_bytes: int = 256 * _KIB
    """Tensors up to this length are received together with their neighbours, and no rank leaves
    them out: a range or a request of its own costs more than their bytes. Guess.
    """
    prepared_tensors: int = 64
    """So many are set up at once, without their memory: some 4 KiB each. One at a time takes three
    times as long (measured with 16 connections on two cores).
    """
    gap_bytes: int = 64 * _KIB
    """A gap between two tensors up to this length is read through rather than skipped. Guess: at
    90 MB/s it takes less than 1 ms, a request to S3 some 20 ms.
    """

    # Stragglers ------------------------------------------------------------------------------

    straggler_seconds: float = 0.5
    """The least time after which a range or a prefetched block may be called a straggler. Guess:
    many times what a range takes from S3 (20 ms and 2 MiB at 90 MB/s).
    """
    straggler_factor: float = 3.0
    """... and so many times the moving average: on a slow link the last ranges of a load would all
    be requested twice otherwise. Guess.
    """
    average_weight: float = 0.1
    """The weight of the latest duration in the moving average. Guess."""
    steal_seconds: float = 0.5
    """A job with a single range left to begin is taken over after that time only: a second request
    costs more than it saves. Guess.
    """
    steal_least_seconds: float = 0.1
    """What a job has left is not taken over if it comes within that time, as ranges do on average:
    the connection that leaves it has to be closed, and a new one be made. Guess.
    """

    # Threads and connections -----------------------------------------------------------------

    start_connections_per_cpu: int = 2
    """A remote load starts with that many connections for each processor. With 16 on two
    processors an encrypted load over HTTP took half as long again.
    """
    least_start_connections: int = 4
    """Guess."""
    most_start_connections: int = 16
    """Guess."""
    most_connections: int = TRANSPORT.most_connections
    """A remote load has no more."""
    local_connections_per_cpu: int = 4
    """A local load grows up to that many threads for each processor. Guess: reads from a disk wait,
    copies from the page cache do not.
    """
    least_connections: int = 4
    """However little memory there is for their buffers. Guess."""
    first_step: int = 64
    """The number after the first step, where the processors are idle: then the link is slow, or
    limits each connection. It was the best one of our client on a link like S3's
    (docs/measurements.md, `loads-epyc`).
    """
    first_step_idle: float = 0.5
    """The part of the processors' time that has to be idle for that first step. Guess."""
    least_idle: float = 0.1
    """With less of the processors' time idle, no more connections are added. Guess."""
    step_gain: float = 1.3
    """A step that doubles the connections has to raise the rate by this factor, else it is taken
    back. Guess.
    """
    wide_step_gain: float = 1.5
    """The same for a step to more than twice the connections. Guess."""
    settle_seconds: float = 0.15
    """Time until new connections run, and are measured; longer where the first byte took longer.
    A shorter one takes the start of a load for its rate, and the step after it for a gain.
    """
    settle_factor: float = 1.5
    """Or so many times what the first byte took. Guess."""
    most_settle_seconds: float = 0.5
    """But no longer. Guess."""
    measure_seconds: float = 0.15
    """Time that a rate is measured over."""
    first_measure_seconds: float = 0.06
    """The same before the first step, which has to tell only whether connections help at all.
    Too rough to compute a number of connections from (measured).
    """
    steady_growth: float = 1.1
    """A rate has settled when it grows by no more than this factor from one measurement to the
    next. Judged before, a server that warms up made a step look worth it: 160 connections were a
    fifth slower than 64 (measured).
    """
    poll_seconds: float = 0.01
    """Time between two looks for the first byte, or at a rate that still grows. Guess."""
    retry_step_seconds: float = 3.0
    """After that time without change one more step is tried: a link may have changed. Guess."""
    fallen_rate: float = 0.6
    """... and at once where the rate is below that part of what it was: what was fetched ahead is
    used up. Guess.
    """
    idle_wait_seconds: float = 0.02
    """A free thread looks that often for a job to take over or a straggler. Guess."""
    room_wait_seconds: float = 0.5
    """The same where it waits for room, of which it is told. Guess."""
    surplus_wait_seconds: float = 0.1
    """The same for a thread above the present number of connections. Guess."""
    consumer_poll_seconds: float = 0.1
    """The consumer looks that often for an error while it waits for a tensor. Guess."""
    join_seconds: float = 0.5
    """Threads that are still in a read at the end are waited for no longer: the read ends with its
    own timeout. Guess.
    """
    header_connections: int = 16
    """Threads that read headers at the end of a load, where the user sets no number. Guess."""

    # Host memory of one load -----------------------------------------------------------------

    kept_part: int = 8
    """1/N of a load's memory is kept for later tensors: fresh pages take half of a
    load's processor time (docs/measurements.md, `limits`). The part is a guess.
    """
    connections_part: tuple[int, int] = (3, 8)
    """(numerator, denominator): the part for the connections' buffers where tensors come together
    in host memory. Guess.
    """
    ahead_bytes: int = _GIB
    """The memory of a load for which the caller gives none: `rank_bytes`."""
    pooled_bytes: int = 256 * _KIB
    """Shorter tensors are left to malloc, which keeps its own pages. Guess."""
    pool_slack: int = 2
    """A kept block serves a tensor of at least one part in so many of its length. Guess."""

    # Ranks that load one file together --------------------------------------------------------

    window_part: int = 4
    """At most 1/N of a load's memory is for what goes from rank to rank, the rest for the rank's
    own part. Guess.
    """
    window_jobs: int = 2
    """... and no more than so many jobs' bytes of each rank: one message on its way, and one that
    waits for the consumer. Guess.
    """
    gathered_bytes: int = _MIB
    """Tensors up to this length go to the other ranks together with their neighbours, up to
    `job_bytes`: a broadcast over gloo takes 0.1 to 0.7 ms whatever its length (measured).
    """
    least_runs: int = 8
    """A small file is cut so that each rank opens that many pieces of it. Guess."""
    shared_sliced_bytes: int = _GIB
    """As `sliced_bytes`, where the tensor comes from another rank, and so by the device. Longer
    ones each rank opens itself. Guess: a quarter of `most_device_ahead`.
    """
    least_share_poll_seconds: float = 0.00005
    """How soon a rank looks for another's word. Guess."""
    most_share_poll_seconds: float = 0.002
    """... and how often after a while. Guess."""
    say_failed_seconds: float = 5.0
    """How long a rank that failed waits for the others to hear it. Guess."""
    rank_ended_seconds: float = 1.0
    """How long what an ended rank has sent may take to arrive. Guess."""
    other_rank_seconds: float = 1.0
    """How long a rank that another one has failed waits, so that the other one's error is reported
    first. Guess.
    """

    # The way to a GPU (not measured on a GPU yet) --------------------------------------------

    ring_slots: int = 64
    """Slots of `part_bytes` in the page-locked ring: 128 MiB, which PCIe 5.0 x16 carries in 3 ms
    (by its specification).
    """
    least_ring_slots: int = 2
    """One to fill while the other one is copied."""
    most_device_ahead: int = 4 * _GIB
    """Tensors that wait on the device for the consumer. Guess: more brings nothing."""
    device_ahead_part: int = 4
    """... and no more than one part in so many of the device's free memory. Guess. vLLM makes its
    KV cache after the load.
    """
    sliced_bytes: int = 256 * _MIB
    """A longer tensor of which the rank's weight loader takes a slice stays in host memory until
    then. Guess: several shorter ones fit on the device at once.
    """

    # The prefetch process --------------------------------------------------------------------

    prefetch_poll_seconds: float = 0.002
    """How often the state of a block is looked at. Guess."""
    prefetch_wait_seconds: float = 30.0
    """A rank waits so long for a block that the prefetch process does not begin; from then on it
    fetches for itself. Guess.
    """
    prefetch_step_seconds: float = 0.25
    """Reports and looks for passed blocks: this time, and a fifth of it. Guess."""
    prefetch_surplus_seconds: float = 0.05
    """As `surplus_wait_seconds`, in that process. Guess."""
    prefetch_report_seconds: float = 0.5
    """Between two events. Guess."""
    prefetch_niceness: int = 10
    """vLLM's own start goes first. With it, vLLM's import took no longer than without prefetching
    (docs/measurements.md, `coldstart-prefetch`).
    """

    # TENSORSERVE_LOADER=reference ------------------------------------------------------------

    reference_connections: int = 4
    """Enough to hide a request's latency from the one thread that reads. Guess."""
    reference_ahead_part: int = 4
    """1/N of the load's memory is for spans read ahead, the rest for tensors.
    Guess.
    """
    read_ahead_bytes: int = 4 * _MIB
    """A range fetched ahead; it ends where the pieces of object stores do (`job_bytes`)."""
    read_ahead_blocks: int = 2
    """For each connection: one that is received while the other one waits to be taken."""
    reference_read_bytes: int = 8 * _MIB
    """The longest read for tensorizer: a load that is ended waits for no more than that. Guess."""

    # Host memory of a start ------------------------------------------------------------------

    rank_bytes: int = _GIB
    """The memory of which one rank's load makes use: the ring, and 6 MiB (a strip, two parts, and
    tensors) for each of some 140 connections, which 100 Gbit/s take at 90 MB/s each. More memory
    only makes more wait.
    """
    least_rank_bytes: int = 512 * _MIB
    """The same for the ring and some 60 connections."""
    prefetched_bytes: int = 4 * _GIB
    """The memory of which prefetching makes use, for all ranks of a machine: 140 connections with
    blocks of 8 MiB, and three times as many blocks that are complete.
    """
    prefetched_part: tuple[int, int] = (3, 8)
    """(numerator, denominator): the least part of the limit for prefetching. Guess."""
    start_part: int = 4
    """A start takes one part in so many of the memory that is available. Guess."""
    most_start_part: int = 2
    """... or one in so many, where that is less than `least_rank_bytes` for each rank. Guess."""
    least_limit: int = 64 * _MIB
    """Less reads no model; TENSORSERVE_HOST_MEMORY_LIMIT accepts no less."""
    progress_seconds: float = 0.25
    """Between two `load_progress` events. Guess."""


DEFAULTS = Tuning()
