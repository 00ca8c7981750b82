/* A link and a cipher that take time and no processor: what is left of a load is our own work. The interpreter's lock is
 * not held meanwhile. */

#include <stdint.h>
#include <time.h>

#define EXPORTED __attribute__((visibility("default")))

static double per_byte; /* nanoseconds of opening */

EXPORTED void set_opening(double nanoseconds)
{
    per_byte = nanoseconds;
}

static void rest(double nanoseconds)
{
    const int64_t whole = (int64_t)nanoseconds;
    const struct timespec time = {whole / 1000000000, whole % 1000000000};
    nanosleep(&time, NULL);
}

EXPORTED int simulated_open(uint8_t *out, const uint8_t *sealed, const uint8_t *tag, unsigned long long length,
                            const uint8_t *nonce, const uint8_t *key)
{
    (void)out, (void)sealed, (void)tag, (void)nonce, (void)key;
    rest((double)length * per_byte);
    return 0;
}

EXPORTED void simulated_begin(void *box, const uint8_t *nonce, const uint8_t *key)
{
    (void)box, (void)nonce, (void)key;
}

EXPORTED void simulated_strip(const void *box, uint64_t hash[3], uint8_t *out, const uint8_t *sealed, uint64_t offset,
                              uint64_t length)
{
    (void)box, (void)hash, (void)out, (void)sealed, (void)offset;
    rest((double)length * per_byte);
}

EXPORTED int simulated_check(const void *box, const uint64_t (*hashes)[3], const uint64_t *lengths, uint64_t count,
                             const uint8_t *tag)
{
    (void)box, (void)hashes, (void)lengths, (void)count, (void)tag;
    return 0;
}

/* As fetch.c: a range in one call, `step` bytes at a time, each of which takes `nanoseconds` to come. */
EXPORTED void simulated_range(int64_t (*take)(void *, const uint8_t *, int64_t), void *sink, const int32_t *full,
                              const uint8_t *data, int64_t size, int64_t step, double nanoseconds)
{
    for (int64_t at = 0; at < size && !*full; at += step) {
        const int64_t count = size - at < step ? size - at : step;
        rest((double)count * nanoseconds);
        take(sink, data + at, count);
    }
}
