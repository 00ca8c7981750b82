/* Reads a TLS connection record after record, without Python between two of them.
 *
 * OpenSSL gives one record (16 KiB at most) a call. Python's ssl takes its lock after each: with many
 * connections the threads then wait for the lock more than for the network. It needs no header of OpenSSL:
 * tls.py hands in the functions of the library that Python's ssl itself uses, and the connection that it made.
 */

#include <errno.h>
#include <limits.h>
#include <poll.h>
#include <stdint.h>
#include <time.h>

/* OpenSSL's (ssl.h); they are part of its ABI. */
#define WANT_READ 2
#define WANT_WRITE 3

/* Beside OpenSSL's own values of SSL_get_error. */
#define NOTHING_IN_TIME -1
#define INTERRUPTED -2

struct openssl {
    int (*read)(void *ssl, void *out, int size);
    int (*get_error)(const void *ssl, int returned);
    void (*clear_errors)(void);
    unsigned long (*peek_error)(void);
};

/* Why it returned before the buffer was full; all 0 if it just took what was there. */
struct end {
    int32_t error; /* SSL_get_error's, or one of the two above */
    int32_t number; /* errno */
    uint64_t reason; /* OpenSSL's error code */
};

static int64_t milliseconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

/* Waits at most `patience` ms for the first byte; then gathers records until `size` bytes are there, or
 * `gather` ms since the call are over. Returns the bytes. */
__attribute__((visibility("default"))) int64_t
tls_receive(const struct openssl *openssl, void *ssl, int fd, uint8_t *out, int64_t size, int64_t gather,
            int64_t patience, struct end *end)
{
    int64_t start = milliseconds(), done = 0;
    *end = (struct end){0};
    while (done < size) {
        int64_t left = size - done;
        openssl->clear_errors();
        errno = 0;
        int got = openssl->read(ssl, out + done, left > INT_MAX ? INT_MAX : (int)left);
        if (got > 0) {
            done += got;
            if (milliseconds() - start >= gather)
                break;
            continue;
        }
        int number = errno;
        int error = openssl->get_error(ssl, got);
        if (error != WANT_READ && error != WANT_WRITE) {
            *end = (struct end){error, number, openssl->peek_error()};
            break;
        }
        int64_t wait = start + (done ? gather : patience) - milliseconds();
        if (wait <= 0) {
            end->error = done ? 0 : NOTHING_IN_TIME;
            break;
        }
        struct pollfd ready = {.fd = fd, .events = error == WANT_READ ? POLLIN : POLLOUT};
        if (poll(&ready, 1, wait > INT_MAX ? INT_MAX : (int)wait) < 0 && errno == EINTR) {
            end->error = done ? 0 : INTERRUPTED; /* Python has to look at its signals */
            break;
        }
    }
    openssl->clear_errors(); /* the next user of this thread's queue is Python's ssl */
    return done;
}
