/* What a job's bytes become, without the interpreter's lock: each span is put where it belongs, and sealed chunks are
 * opened as they come.
 *
 * A tensor's header may come after some of its bytes: these are put in their place as they are, and opened when the
 * header is known (tensor_ready). One that is as expected is taken here (tensor_header.h), else Python parses it. C counts
 * what is plain text, and tells Python of rows that completed a tensor or did not authenticate (`events`).
 *
 * fetch.c calls table_take from libcurl's callback; Python calls it for bytes that it has read itself. Several jobs
 * bring pieces of one chunk, in any order: struct chunk is shared by their threads. The cipher's functions are given by
 * span_table.py: those of secretbox.c, or libsodium's, which opens whole chunks only.
 */

#define _GNU_SOURCE
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "tensor_header.h"

#define EXPORTED __attribute__((visibility("default")))

#define TAG 16
#define NONCE 24
#define BOX 128       /* bytes of struct box in secretbox.c */
#define ALIGNMENT 64  /* a strip begins at a multiple of it */
#define STRIPS 24     /* opened ones of a chunk; what comes beyond them waits, sealed, for the rest */
#define PAGE 4096
#define POPULATE_WRITE 23 /* MADV_POPULATE_WRITE, Linux 5.14 */

typedef struct {
    int (*open)(uint8_t *out, const uint8_t *sealed, const uint8_t *tag, unsigned long long length,
                const uint8_t *nonce, const uint8_t *key);
    /* NULL where only whole chunks can be opened. */
    void (*begin)(void *box, const uint8_t *nonce, const uint8_t *key);
    void (*open_strip)(const void *box, uint64_t hash[3], uint8_t *out, const uint8_t *sealed, uint64_t offset,
                       uint64_t length);
    int (*check)(const void *box, const uint64_t (*hashes)[3], const uint64_t *lengths, uint64_t count,
                 const uint8_t *tag);
    int64_t populates; /* whether the kernel has MADV_POPULATE_WRITE */
} cipher;

typedef struct {
    int64_t offset, length;
    uint64_t hash[3];
} strip;

/* A chunk of which some bytes have come. */
typedef struct {
    int64_t left;
    int32_t begun, count;
    uint8_t box[BOX] __attribute__((aligned(64)));
    strip strips[STRIPS];
} partial;

typedef struct {
    int64_t start, length;
} piece;

typedef struct {
    uint8_t *place; /* the tensor's memory */
    int64_t length;
    const cipher *c;
    const uint8_t *key; /* NULL: plain */
    const uint8_t *nonce, *tags;
    int64_t chunk_bytes, chunks;
    partial **partials; /* by chunk; NULL: nothing of it has come, or all */
    uint8_t *failed;    /* by chunk: whether it did not authenticate */
    int64_t left;       /* bytes that are not plain text yet, and one for the header */
    piece *early;       /* came before the header */
    int32_t early_count, early_room;
    int32_t waits;      /* for the header, which says whether bytes are sealed */
    int32_t lock;
    const uint8_t *expected; /* of the header; NULL: Python parses it */
    int64_t expected_size;
    uint8_t *head; /* memory for the header */
    int64_t head_size;
    const uint8_t *file_key; /* NULL: the file is plain */
    int32_t headed; /* whether the header was taken here: `partials` and `failed` are of calloc */
} tensor;

/* Bytes [start, start + length) of a tensor, within one span. */
typedef struct {
    tensor *t;
    int64_t start, length;
    int64_t finished; /* bytes that are plain text in their place because of this row */
    int32_t failures; /* chunks of these that did not authenticate: Python counts `finished` */
    int32_t complete; /* whether that was the last of the tensor */
    int32_t early;    /* whether the header had not come */
    int32_t header;   /* whether it is the header, of `length` bytes; what it has finished may be all of the tensor */
} row;

typedef struct {
    int64_t length;
    uint8_t *direct; /* received in its place; NULL: into the thread's buffer first */
    int32_t first_row, rows;
    int32_t call;    /* enum caller */
    int32_t claimed; /* by the thread whose copy is used */
    int32_t mine;    /* whether that was this table's thread */
} span;

typedef struct {
    span *spans;
    row *rows;
    uint8_t *buffer; /* as long as the longest span that is not direct */
    int64_t buffer_size;
    int (*call)(void *owner, int);
    void *owner;
    const cipher *c;
    int64_t filled; /* of the span that is being received */
    int64_t done;
    int64_t began;  /* nanoseconds, monotonic */
    int64_t opening; /* nanoseconds */
    int64_t fetched, opened; /* bytes of rows that have come, and that were opened by this table */
    int32_t *event;  /* rows that Python has to look at, `events` of them */
    uint64_t progress; /* low half: spans that are done; high half: those that are wanted */
    int32_t stopped, finished;
    int32_t events;
} table;

/* Who assembles a span: C; Python, which may plan the rows behind it; C where all headers in it are as expected. */
enum caller { BY_C, BY_PYTHON, BY_C_IF_EXPECTED };

static int64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void lock(tensor *t)
{
    while (__atomic_exchange_n(&t->lock, 1, __ATOMIC_ACQUIRE)) {
        sched_yield();
    }
}

static void unlock(tensor *t)
{
    __atomic_store_n(&t->lock, 0, __ATOMIC_RELEASE);
}

/* Fresh pages in one call: a fault for each costs 1.5 times as much. */
static void populate(const cipher *c, uint8_t *place, int64_t length)
{
    if (c->populates && length >= 16 * PAGE) {
        const uintptr_t first = ((uintptr_t)place + PAGE - 1) / PAGE * PAGE;
        const uintptr_t end = ((uintptr_t)place + (uintptr_t)length) / PAGE * PAGE;
        (void)madvise((void *)first, end - first, POPULATE_WRITE);
    }
}

/* Chunks ------------------------------------------------------------------------------------------------------ */

/* (first + index) mod 2^192, little-endian. */
static void nonce_at(uint8_t nonce[NONCE], const uint8_t *first, uint64_t index)
{
    uint64_t carry = index;
    for (int i = 0; i < NONCE; i++) {
        carry += first[i];
        nonce[i] = (uint8_t)carry;
        carry >>= 8;
    }
}

static int64_t least(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static int by_offset(const void *a, const void *b)
{
    const int64_t x = ((const strip *)a)->offset, y = ((const strip *)b)->offset;
    return x < y ? -1 : x > y;
}

/* All of a chunk, [begin, begin + length) of the tensor, is in its place: what is sealed is opened, and the tag compared.
 * 0 if it is valid. */
static int finish(tensor *t, partial *p, int64_t index, int64_t begin, int64_t length)
{
    uint8_t nonce[NONCE];
    const uint8_t *tag = t->tags + index * TAG;
    if (!p->begun) {
        nonce_at(nonce, t->nonce, (uint64_t)index);
        return t->c->open(t->place + begin, t->place + begin, tag, (unsigned long long)length, nonce, t->key);
    }
    uint64_t hashes[2 * STRIPS + 1][3], lengths[2 * STRIPS + 1], count = 0;
    int64_t at = 0;
    qsort(p->strips, (size_t)p->count, sizeof(strip), by_offset);
    for (int i = 0; i <= p->count; i++) {
        const int64_t next = i < p->count ? p->strips[i].offset : length;
        if (at < next) {
            uint8_t *here = t->place + begin + at;
            t->c->open_strip(p->box, hashes[count], here, here, (uint64_t)at, (uint64_t)(next - at));
            lengths[count++] = (uint64_t)(next - at);
        }
        if (i < p->count) {
            memcpy(hashes[count], p->strips[i].hash, sizeof hashes[count]);
            lengths[count++] = (uint64_t)p->strips[i].length;
            at = next + p->strips[i].length;
        }
    }
    return t->c->check(p->box, (const uint64_t(*)[3])hashes, lengths, count, tag);
}

/* NULL if there is no memory. */
static partial *partial_of(tensor *t, int64_t index, int64_t length)
{
    lock(t);
    partial *p = t->partials[index];
    if (p == NULL && posix_memalign((void **)&p, 64, sizeof(partial)) == 0) {
        p->left = length;
        p->count = 0;
        p->begun = t->c->begin != NULL;
        if (p->begun) {
            uint8_t nonce[NONCE];
            nonce_at(nonce, t->nonce, (uint64_t)index);
            t->c->begin(p->box, nonce, t->key);
        }
        t->partials[index] = p;
    }
    unlock(t);
    return p;
}

/* Bytes [first, last) of a chunk that is [begin, end) have come: 1 when that was the last of it, -1 when it does not
 * authenticate. `data` is NULL where they are in their place, sealed. */
static int some_of(tensor *t, int64_t index, int64_t begin, int64_t end, int64_t first, int64_t last,
                   const uint8_t *data)
{
    partial *p = partial_of(t, index, end - begin);
    if (p == NULL) {
        abort(); /* no memory for 1 KiB */
    }
    if (data != NULL) {
        int64_t from = last, to = last;
        strip *s = NULL;
        populate(t->c, t->place + first, last - first);
        if (p->begun) {
            /* Whole blocks of the cipher; the bytes around them wait for the rest of theirs. */
            from = least(begin + (first - begin + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT, last);
            to = last == end ? last : begin + (last - begin) / ALIGNMENT * ALIGNMENT;
            if (from < to) {
                lock(t);
                s = p->count < STRIPS ? &p->strips[p->count++] : NULL;
                unlock(t);
            }
            if (s == NULL) {
                from = to = last;
            }
        }
        memcpy(t->place + first, data, (size_t)(from - first));
        if (s != NULL) {
            s->offset = from - begin;
            s->length = to - from;
            t->c->open_strip(p->box, s->hash, t->place + from, data + (from - first), (uint64_t)(from - begin),
                             (uint64_t)(to - from));
        }
        memcpy(t->place + to, data + (to - first), (size_t)(last - to));
    }
    lock(t);
    p->left -= last - first;
    const int whole = p->left == 0;
    if (whole) {
        t->partials[index] = NULL;
    }
    unlock(t);
    if (!whole) {
        return 0;
    }
    const int bad = finish(t, p, index, begin, end - begin);
    free(p);
    return bad ? -1 : 1;
}

/* Bytes [start, start + length) of a sealed tensor have come. Gives how many bytes became plain text; chunks that did
 * not authenticate are among them, counted in `failures`, and noted in t->failed. */
EXPORTED int64_t tensor_take(tensor *t, int64_t start, const uint8_t *data, int64_t length, int32_t *failures)
{
    int64_t finished = 0;
    const int64_t stop = start + length;
    for (int64_t index = start / t->chunk_bytes; index * t->chunk_bytes < stop; index++) {
        const int64_t begin = index * t->chunk_bytes, end = least(begin + t->chunk_bytes, t->length);
        const int64_t first = start > begin ? start : begin, last = least(stop, end);
        const uint8_t *here = data == NULL ? NULL : data + (first - start);
        int result;
        if (here != NULL && first == begin && last == end) {
            uint8_t nonce[NONCE];
            nonce_at(nonce, t->nonce, (uint64_t)index);
            populate(t->c, t->place + begin, end - begin);
            result = t->c->open(t->place + begin, here, t->tags + index * TAG, (unsigned long long)(end - begin),
                                nonce, t->key)
                         ? -1
                         : 1;
        } else {
            result = some_of(t, index, begin, end, first, last, here);
        }
        if (result < 0) {
            t->failed[index] = 1;
            ++*failures;
        }
        finished += result ? end - begin : 0;
    }
    return finished;
}

/* `count` more bytes are plain text: 1 when that was the last of the tensor. */
EXPORTED int tensor_count(tensor *t, int64_t count)
{
    return __atomic_sub_fetch(&t->left, count, __ATOMIC_ACQ_REL) == 0;
}

/* Notes that bytes came before the header, unless it has come. */
static int kept_early(tensor *t, int64_t start, int64_t length)
{
    lock(t);
    const int waits = t->waits;
    if (waits) {
        if (t->early_count == t->early_room) {
            t->early_room = t->early_room ? 2 * t->early_room : 16;
            t->early = realloc(t->early, (size_t)t->early_room * sizeof(piece));
            if (t->early == NULL) {
                abort(); /* no memory for some KiB */
            }
        }
        t->early[t->early_count++] = (piece){start, length};
    }
    unlock(t);
    return waits;
}

/* Puts a row's bytes where they belong. */
static void put(row *r, const uint8_t *data)
{
    tensor *t = r->t;
    if (__atomic_load_n(&t->waits, __ATOMIC_ACQUIRE) || t->key == NULL) {
        populate(t->c, t->place + r->start, r->length);
        memcpy(t->place + r->start, data, (size_t)r->length);
        r->early = kept_early(t, r->start, r->length);
        if (r->early || t->key == NULL) {
            r->finished = r->early ? 0 : r->length;
            return;
        }
        data = NULL;
    }
    r->finished = tensor_take(t, r->start, data, r->length, &r->failures);
}

/* Counts what a row has brought, where nothing failed. Non-zero: Python has to look at it. */
static int settled(row *r)
{
    if (r->failures) {
        return 1;
    }
    r->complete = r->finished && tensor_count(r->t, r->finished);
    return r->complete;
}

/* For bytes that Python has: `r` says which, and is filled in. */
EXPORTED void tensor_put(row *r, const uint8_t *data)
{
    put(r, data);
    (void)settled(r);
}

/* The header is known, and what it says is in `t`: what came before it is opened, `taken` bytes. Gives how many became
 * plain text, which are not counted yet. */
EXPORTED int64_t tensor_ready(tensor *t, int64_t *taken, int32_t *failures)
{
    int64_t finished = 0;
    *taken = 0;
    lock(t);
    piece *early = t->early;
    const int count = t->early_count;
    t->early = NULL;
    t->early_count = t->early_room = 0;
    __atomic_store_n(&t->waits, 0, __ATOMIC_RELEASE);
    unlock(t);
    for (int i = 0; i < count; i++) {
        *taken += early[i].length;
        finished += t->key == NULL ? early[i].length : tensor_take(t, early[i].start, NULL, early[i].length, failures);
    }
    free(early);
    return finished;
}

/* The load has ended before all of it came. */
EXPORTED void tensor_free(tensor *t)
{
    for (int64_t i = 0; t->partials != NULL && i < t->chunks; i++) {
        free(t->partials[i]);
        t->partials[i] = NULL;
    }
    free(t->early);
    t->early = NULL;
    if (t->headed) {
        free(t->partials);
        free(t->failed);
        t->partials = NULL;
        t->failed = NULL;
    }
}

/* A header that fits has come. */
static int64_t take_header(row *r)
{
    tensor *t = r->t;
    int64_t taken;
    header_fields fields;
    (void)header_fits(t->head, t->head_size, t->expected, t->expected_size, t->file_key != NULL, t->length, &fields);
    if (fields.chunks) {
        t->partials = calloc((size_t)fields.chunks, sizeof(partial *));
        t->failed = calloc((size_t)fields.chunks, 1);
        if (t->partials == NULL || t->failed == NULL) {
            abort(); /* no memory for nine bytes a chunk */
        }
        t->nonce = fields.nonce;
        t->tags = fields.tags;
        t->chunks = fields.chunks;
        t->chunk_bytes = fields.chunk_bytes;
        t->key = t->file_key;
    }
    t->headed = 1;
    r->finished = tensor_ready(t, &taken, &r->failures) + 1;
    return t->key == NULL ? 0 : taken;
}

/* Spans ------------------------------------------------------------------------------------------------------- */

/* Whether all headers of a span are as expected; they are in their memory then. */
static int headers_fit(const table *b, const span *s, const uint8_t *data)
{
    header_fields fields;
    for (int i = s->first_row; i < s->first_row + s->rows; i++) {
        const row *r = &b->rows[i];
        const tensor *t = r->t;
        if (r->header) {
            memcpy(t->head, data, (size_t)r->length);
            if (!header_fits(t->head, t->head_size, t->expected, t->expected_size, t->file_key != NULL, t->length,
                             &fields)) {
                return 0;
            }
        }
        data += r->length;
    }
    return 1;
}

/* What is in a span's rows has come: `data`, or NULL where it was received in its place. */
static void settle(table *b, const span *s, const uint8_t *data)
{
    for (int i = s->first_row; i < s->first_row + s->rows; i++) {
        row *r = &b->rows[i];
        if (r->header) {
            b->opened += take_header(r);
            data += r->length;
        } else if (data == NULL) {
            r->finished = r->length;
        } else {
            put(r, data);
            data += r->length;
            b->opened += r->t->key != NULL && !r->early ? r->length : 0;
        }
        if (settled(r)) {
            b->event[b->events] = i;
            __atomic_store_n(&b->events, b->events + 1, __ATOMIC_RELEASE);
        }
    }
}

/* The first one whose copy is used: 1 once for each span. */
EXPORTED int table_claim(table *b, int number)
{
    return !__atomic_exchange_n(&b->spans[number].claimed, 1, __ATOMIC_ACQ_REL);
}

/* All of span `number` is there. Non-zero: an error in what Python was called for. */
static int complete(table *b, int number, const uint8_t *data)
{
    span *s = &b->spans[number];
    const int64_t began = now();
    int bad = 0;
    if (s->direct == NULL) {
        s->mine = table_claim(b, number);
    }
    if (s->call == BY_C_IF_EXPECTED && s->mine && !headers_fit(b, s, data)) {
        s->call = BY_PYTHON;
    }
    if (s->call == BY_PYTHON) {
        bad = b->call(b->owner, number);
    } else if (s->mine) {
        settle(b, s, s->direct == NULL ? data : NULL);
    }
    b->filled = 0;
    b->began = now();
    if (s->call != BY_PYTHON) {
        b->opening += b->began - began;
        for (int i = s->first_row; i < s->first_row + s->rows; i++) {
            b->fetched += b->rows[i].header ? 0 : b->rows[i].length;
        }
    }
    return bad;
}

/* One more span is done: 1 when no more is wanted of this table. */
static int advance(table *b)
{
    const uint64_t after = __atomic_add_fetch(&b->progress, 1, __ATOMIC_ACQ_REL);
    return (uint32_t)after >= (uint32_t)(after >> 32);
}

/* Spans from `stop` on are another's; 0 where they are, or one of them is begun. */
EXPORTED int table_give_up(table *b, int stop)
{
    uint64_t before = __atomic_load_n(&b->progress, __ATOMIC_ACQUIRE);
    do {
        if ((int64_t)(before >> 32) <= stop || (int64_t)(uint32_t)before >= stop) {
            return 0;
        }
    } while (!__atomic_compare_exchange_n(&b->progress, &before, (uint64_t)stop << 32 | (uint32_t)before, 0,
                                          __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE));
    return 1;
}

/* Where the next bytes may be written by the caller, and how many; table_take with NULL then takes them. A span that is
 * received in its place is claimed before its first byte: where another thread was first, its bytes are dropped. */
EXPORTED uint8_t *table_room(table *b, int64_t *room)
{
    const int number = (int)(uint32_t)__atomic_load_n(&b->progress, __ATOMIC_ACQUIRE);
    span *s = &b->spans[number];
    *room = s->length - b->filled;
    if (s->direct == NULL) {
        return b->buffer + b->filled;
    }
    if (!b->filled && !s->mine) {
        s->mine = table_claim(b, number);
        if (s->mine) {
            populate(b->c, s->direct, s->length);
        }
    }
    if (s->mine) {
        return s->direct + b->filled;
    }
    *room = least(*room, b->buffer_size);
    return b->buffer;
}

/* Takes `size` bytes, which follow the last ones; gives how many were wanted. */
EXPORTED int64_t table_take(table *b, const uint8_t *data, int64_t size)
{
    int64_t left = size;
    while (left && !b->finished) {
        const uint32_t number = (uint32_t)__atomic_load_n(&b->progress, __ATOMIC_ACQUIRE);
        int64_t room;
        uint8_t *to = table_room(b, &room);
        const int64_t count = least(left, room);
        const span *s = &b->spans[number];
        const uint8_t *whole = b->buffer;
        if (data != NULL) {
            if (count == s->length && s->direct == NULL && !s->call) {
                whole = data; /* opened where it lies */
            } else {
                memcpy(to, data, (size_t)count);
            }
            data += count;
        }
        left -= count;
        b->filled += count;
        b->done += count;
        if (b->filled == s->length) {
            const int bad = complete(b, (int)number, whole);
            b->finished = bad || advance(b) || __atomic_load_n(&b->stopped, __ATOMIC_RELAXED);
        }
    }
    return size - left;
}

/* Plans spans from `number` on, and rows from `r` on, of which each span has one: bytes [start, stop) of a tensor, cut at
 * multiples of `size`. `direct`: they are received in their place. */
EXPORTED void table_run(table *b, int number, int r, tensor *t, int64_t start, int64_t stop, int64_t size, int direct)
{
    while (start < stop) {
        const int64_t end = least((start / size + 1) * size, stop);
        b->rows[r] = (row){.t = t, .start = start, .length = end - start};
        b->spans[number++] = (span){
            .length = end - start, .direct = direct ? t->place + start : NULL, .first_row = r++, .rows = 1};
        start = end;
    }
}

/* For the fuzzer: as header_fits; gives chunks and bytes of a chunk, and where nonce and tags begin. */
EXPORTED int tensor_header_fits(const uint8_t *data, int64_t size, const uint8_t *expected, int64_t fixed, int sealed,
                                int64_t length, int64_t found[4])
{
    header_fields fields;
    if (!header_fits(data, size, expected, fixed, sealed, length, &fields)) {
        return 0;
    }
    found[0] = fields.chunks;
    found[1] = fields.chunk_bytes;
    found[2] = fields.nonce == NULL ? 0 : fields.nonce - data;
    found[3] = fields.tags == NULL ? 0 : fields.tags - data;
    return 1;
}

EXPORTED int64_t table_sizes(int which)
{
    const int64_t sizes[] = {sizeof(cipher), sizeof(tensor), sizeof(row), sizeof(span), sizeof(table)};
    return which >= 0 && which < 5 ? sizes[which] : 0;
}
