"""The ring on a real device: page-locked, each slot used again only when its copy is done."""

from __future__ import annotations

import threading

import pytest
import torch
from gpu_work import BusyLink, side_stream, slow, synchronize

from tensorserve.loading.gpu_staging import SLOT_BYTES, GpuStaging


def test_slots_are_page_locked(device: torch.device) -> None:
    """Else each copy would go through the driver's own buffer, and wait."""
    staging = GpuStaging(device, 8 * SLOT_BYTES)
    slots = [staging.take() for _ in range(8)]
    assert all(len(slot) == SLOT_BYTES for slot in slots)
    assert len({slot.data_ptr() for slot in slots}) == 8
    if device.type == "cuda":
        assert all(slot.is_pinned() for slot in slots)
    for slot in slots:
        staging.give_back(slot)
    staging.close()


@pytest.mark.parametrize("slots", [2, 16])
def test_a_slot_is_not_filled_while_it_is_sent(device: torch.device, slots: int) -> None:
    """Eight threads on a busy link, each slot written over as soon as it can be had."""
    link = BusyLink(device)
    with side_stream(device):
        staging = GpuStaging(device, slots * SLOT_BYTES)
        rounds = 12
        targets = [staging.memory(rounds * SLOT_BYTES) for _ in range(8)]
        link.occupy(20)

        def work(number: int) -> None:
            for at in range(rounds):
                slot = staging.take()
                slot.fill_((number * rounds + at) % 251)
                staging.send(slot, targets[number][at * SLOT_BYTES : (at + 1) * SLOT_BYTES])
                if at % 4 == 0:
                    link.occupy()

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        staging.join(staging.sent())
        for number, target in enumerate(targets):
            rows = target.reshape(rounds, SLOT_BYTES)
            for at in range(rounds):
                assert bool((rows[at] == (number * rounds + at) % 251).all())


def test_what_was_sent_is_there_after_joining(device: torch.device) -> None:
    """On the consumer's stream, without waiting for the device; on a stream of its own too."""
    link = BusyLink(device)
    with side_stream(device):
        staging = GpuStaging(device, 4 * SLOT_BYTES)
        memory = staging.memory(SLOT_BYTES)
        memory.fill_(0xA5)
        link.occupy(20)
        slot = staging.take()
        slot.fill_(3)
        staging.send(slot, memory)
        staging.join(staging.sent())
        read = memory.clone()
    synchronize(device)
    assert bool((read == 3).all())


def test_closing_waits_for_what_is_on_its_way(device: torch.device) -> None:
    """After a load that ended early, its memory may be used for something else."""
    link = BusyLink(device)
    staging = GpuStaging(device, 4 * SLOT_BYTES)
    memory = staging.memory(SLOT_BYTES)
    link.occupy(20)
    slot = staging.take()
    slot.fill_(3)
    staging.send(slot, memory)
    staging.stop()
    staging.close()
    if device.type == "cuda":
        # On another stream, which waits for nothing: the copy must be over.
        with torch.cuda.stream(torch.cuda.Stream(device)):
            memory.fill_(4)
            assert bool((memory == 4).all())
    synchronize(device)
    assert bool((memory == (4 if device.type == "cuda" else 3)).all())


def test_threads_do_not_wait_for_a_busy_consumer(device: torch.device) -> None:
    """Only memory is waited for, not the consumer's work: sending goes on beside it."""
    with side_stream(device):
        staging = GpuStaging(device, 64 * SLOT_BYTES)
        memory = staging.memory(SLOT_BYTES)
        slow(device, 500)
        done = None
        if device.type == "cuda":
            done = torch.cuda.Event()
            done.record()
        slot = staging.take()
        slot.fill_(5)
        staging.send(slot, memory)
        sent = staging.sent()
        if isinstance(sent, torch.cuda.Event):
            sent.synchronize()
            assert done is not None
            assert not done.query(), "the copy waited for the consumer"
    staging.close()
    assert bool((memory == 5).all())
