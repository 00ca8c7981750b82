/* Does a tensor's header say, byte for byte, what the index says of it, and how its chunks are sealed? Anything else is
 * for Python to judge (format/header.py, which has the layout): what is refused there is never taken here.
 * tests/fuzz/index_target.py compares the two.
 */

#include <stdint.h>
#include <string.h>

typedef struct {
    int64_t chunks, chunk_bytes; /* 0, 0: plain */
    const uint8_t *nonce, *tags;
} header_fields;

enum {
    CRC32 = 0, CRC32_BYTES = 4, SHA256 = 1, SHA256_BYTES = 32,
    CIPHER_ENTRY = 2, LEAST_CHUNK = 1024, CHUNK_QUANTUM = 64, NONCE_BYTES = 24, TAG_BYTES = 16,
    /* Of the crypto section, to the tags: number of entries, the entry's length and type, the chunk's size, the nonce,
     * the number of tags. */
    BEFORE_ENTRY = 10, BEFORE_CHUNK = 12, BEFORE_NONCE = 20, BEFORE_COUNT = 44, BEFORE_TAGS = 52,
};

static uint64_t little_endian(const uint8_t *data, int size)
{
    uint64_t value = 0;
    while (size--) {
        value = value << 8 | data[size];
    }
    return value;
}

static int hashes_fit(const uint8_t *data, int64_t size, int needs_sha256)
{
    int64_t at = 1;
    int found = 0;
    if (size < 1) {
        return 0;
    }
    for (int left = data[0]; left--;) {
        if (size - at < 2) {
            return 0;
        }
        const int type = data[at], length = data[at + 1];
        at += 2;
        if (length != (type == CRC32 ? CRC32_BYTES : type == SHA256 ? SHA256_BYTES : -1) || found & 1 << type ||
            size - at < length) {
            return 0;
        }
        found |= 1 << type;
        at += length;
    }
    return at == size && (found & 1 << SHA256 || !needs_sha256);
}

/* The crypto section [data, data + size) of `length` bytes of data: one entry, no key derivation. */
static int cipher_fits(const uint8_t *data, int64_t size, int64_t length, header_fields *fields)
{
    if (length < 1 || size < BEFORE_TAGS || little_endian(data, 2) != 1 ||
        little_endian(data + 2, 8) != (uint64_t)(size - BEFORE_ENTRY) ||
        little_endian(data + BEFORE_ENTRY, 2) != CIPHER_ENTRY) {
        return 0;
    }
    const uint64_t chunk = little_endian(data + BEFORE_CHUNK, 8), count = little_endian(data + BEFORE_COUNT, 8);
    const uint64_t whole = (uint64_t)length;
    if (chunk < LEAST_CHUNK || chunk % CHUNK_QUANTUM || chunk > INT64_MAX || (size - BEFORE_TAGS) % TAG_BYTES ||
        count != (uint64_t)(size - BEFORE_TAGS) / TAG_BYTES ||
        (count != 1 && count != whole / chunk + (whole % chunk != 0))) {
        return 0;
    }
    fields->chunks = (int64_t)count;
    fields->chunk_bytes = count == 1 ? length : (int64_t)chunk;
    fields->nonce = data + BEFORE_NONCE;
    fields->tags = data + BEFORE_TAGS;
    return 1;
}

/* `expected`: what the index says of the header's first fields, `fixed` bytes, without the module's number, which is
 * two bytes behind the first eight. `length`: of the tensor's data. */
static int header_fits(const uint8_t *data, int64_t size, const uint8_t *expected, int64_t fixed, int sealed,
                       int64_t length, header_fields *fields)
{
    int64_t at = fixed + 2;
    *fields = (header_fields){0};
    if (fixed < 8 || size < at + 2 || memcmp(data, expected, 8) != 0 ||
        memcmp(data + 10, expected + 8, (size_t)(fixed - 8)) != 0) {
        return 0;
    }
    const int64_t hashes = (int64_t)little_endian(data + at, 2);
    at += 2;
    if (hashes > size - at || !hashes_fit(data + at, hashes, !sealed)) {
        return 0;
    }
    at += hashes;
    if (sealed) {
        if (size - at < 8) {
            return 0;
        }
        const uint64_t section = little_endian(data + at, 8);
        at += 8;
        if (section > (uint64_t)(size - at) || !cipher_fits(data + at, (int64_t)section, length, fields)) {
            return 0;
        }
        at += (int64_t)section;
    }
    return size - at == 8 && little_endian(data + at, 8) == (uint64_t)length;
}
