/* One HTTP request in one call, without the interpreter's lock: libcurl receives, and this file says where the bytes go.
 *
 * No header of libcurl is needed: curl.py passes its functions, and the numbers of options are part of its ABI (curl.h).
 * Python decides what is asked for, and judges the answer: `judge` is called when the header is complete, before the
 * first byte of the body is taken, except where the header says, byte for byte, what is expected of a range. libcurl
 * neither resolves names nor connects: `dial` gives it a connected socket, so that only checked addresses are reached.
 */

#include <stdint.h>
#include <string.h>
#include <strings.h>
#include <time.h>

#define EXPORTED __attribute__((visibility("default")))

/* Options (curl.h). */
enum {
    WRITEDATA = 10001, URL = 10002, PROXY = 10004, ERRORBUFFER = 10010, HTTPHEADER = 10023, HEADERDATA = 10029,
    CAINFO = 10065, CAPATH = 10097, SSL_CTX_DATA = 10109, SOCKOPTDATA = 10149, OPENSOCKETDATA = 10164, NOPROXY = 10177,
    RESOLVE = 10203, PROXYHEADER = 10228, PROXY_CAINFO = 10246, PROXY_CAPATH = 10247, REQUEST_TARGET = 10266,
    PREREQDATA = 10313,
    WRITEFUNCTION = 20011, HEADERFUNCTION = 20079, SSL_CTX_FUNCTION = 20108, SOCKOPTFUNCTION = 20148,
    OPENSOCKETFUNCTION = 20163, PREREQFUNCTION = 20312,
    SSLVERSION = 32, HTTPPROXYTUNNEL = 61, HTTP_VERSION = 84, BUFFERSIZE = 98, NOSIGNAL = 99, PROXYTYPE = 101,
    HTTP_CONTENT_DECODING = 158, PROTOCOLS = 181, HEADEROPT = 229, PATH_AS_IS = 234, PROXY_SSLVERSION = 250,
    SUPPRESS_CONNECT_HEADERS = 265,
    MULTI_MAXCONNECTS = 6, RESPONSE_CODE = 0x200002, HTTP_CONNECTCODE = 0x200016,
};
enum {
    HTTP_1_1 = 2, HTTP_AND_HTTPS = 3, TLS_1_2 = 6, PROXY_HTTPS = 2, SEPARATE = 1, ALREADY_CONNECTED = 2, DONE = 1,
    SELECT_IN = 1,
};
/* OpenSSL's SSL_CTX_ctrl (ssl.h). */
enum { SET_READ_AHEAD = 41, CLEAR_MODE = 78, RELEASE_BUFFERS = 16 };

typedef struct {
    void *(*easy_init)(void);
    void (*easy_cleanup)(void *);
    int (*setopt)(void *, int, ...);
    int (*getinfo)(void *, int, ...);
    void *(*multi_init)(void);
    int (*multi_cleanup)(void *);
    int (*multi_setopt)(void *, int, ...);
    int (*add)(void *, void *);
    int (*remove)(void *, void *);
    int (*act)(void *, int, int, int *);
    int (*act_on_all)(void *, int *);
    int (*poll)(void *, void *, unsigned, int, int *);
    int (*wakeup)(void *);
    struct message { int kind; void *easy; union { void *any; int code; } data; } *(*read)(void *, int *);
    void *(*append)(void *, const char *);
    void (*free_list)(void *);
    void (*set_store)(void *context, void *store); /* OpenSSL's SSL_CTX_set1_cert_store */
    int (*set_suites)(void *context, const char *names);
    long (*control)(void *context, int what, long value, void *more);
} curl;

/* Why a call ended; 0: libcurl says it, in `code`. */
enum end { BY_CURL, STALLED, SLOW, NO_CONNECTION, BROKEN_OFF, BY_CALLBACK, LONG_HEADER, SLOW_ERROR };
/* What becomes of a body. */
enum verdict { DROP, TAKE, COLLECT };
/* Where a request is. */
enum phase { CONNECTING, ASKED, RECEIVING, COLLECTING };

typedef struct {
    /* What Python sets. Texts end with 0; times are nanoseconds. */
    const char *target;
    const char *const *headers; /* ends with NULL */
    const char *content_range; /* what a range's header must say to be taken without `judge`; NULL: ask */
    const char *etag;
    int64_t wanted; /* bytes of that range */
    int64_t stall, connect;
    double minimum_rate; /* bytes per second, over `stall` */
    int64_t tick; /* call `tick` that often; 0: never */
    char *head; /* memory for the header, and for an error's document */
    int64_t head_size;
    char *document;
    int64_t document_size;
    int64_t *counter; /* bytes received are added to it; other threads read it */
    int (*judge)(void); /* gives an enum verdict, with `out` and `room` set for TAKE */
    int (*next)(void); /* `room` is used up: 0 with the next `out` and `room`, 1 for no more */
    int (*dial)(void); /* gives a connected socket, or -1 */
    int (*ticked)(void); /* 0 to go on */
    /* Where bytes go instead of `out`: it gives how many of them it wanted; `*full`: no more. NULL: `out`. */
    int64_t (*take)(void *sink, const uint8_t *data, int64_t size);
    void *sink;
    const int32_t *full;
    /* What changes meanwhile. */
    uint8_t *out; /* where the next byte goes */
    int64_t room; /* how many bytes may go there */
    int64_t done; /* bytes of the body that were taken */
    /* What Python reads afterwards. */
    int32_t end, code;
    int32_t status, connect_status;
    int64_t head_length, document_length;
    char message[256];
    /* Ours. */
    int32_t phase, verdict, judged, finished;
    int64_t since; /* when the phase began, or the last byte came */
    int64_t window_start, window_bytes;
} job;

typedef struct {
    const curl *c;
    void *easy, *multi, *lists[2], *store;
    const char *suites; /* of TLS 1.3, in our order; NULL: OpenSSL's */
    job *j;
    volatile int32_t broken_off;
    int32_t fd;    /* the connection's */
    int32_t moved; /* whether something came */
} handle;

static int64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* The header ------------------------------------------------------------------------------------------------- */

/* The value of the header line [line, end), if its name is `name`; NULL otherwise. Sets its length. */
static const char *value_of(const char *line, const char *end, const char *name, int64_t *length)
{
    const int64_t size = (int64_t)strlen(name);
    if (end - line <= size || strncasecmp(line, name, (size_t)size) != 0 || line[size] != ':') {
        return NULL;
    }
    line += size + 1;
    while (line < end && (*line == ' ' || *line == '\t')) {
        line++;
    }
    while (end > line && (end[-1] == '\r' || end[-1] == '\n')) {
        end--;
    }
    *length = end - line;
    return line;
}

static int same(const char *value, int64_t length, const char *expected)
{
    return (int64_t)strlen(expected) == length && memcmp(value, expected, (size_t)length) == 0;
}

/* The number that all of [value, value + length) is; -1 if it is none. */
static int64_t number_of(const char *value, int64_t length)
{
    int64_t number = 0;
    if (length < 1 || length > 18) {
        return -1;
    }
    for (int64_t i = 0; i < length; i++) {
        if (value[i] < '0' || value[i] > '9') {
            return -1;
        }
        number = number * 10 + (value[i] - '0');
    }
    return number;
}

/* The status of a header's first line; 0 if it has none. */
static int status_of(const char *head, int64_t length)
{
    const char *end = head + length, *at = memchr(head, ' ', (size_t)length);
    return at != NULL && end - at >= 4 ? (int)number_of(at + 1, 3) : 0;
}

/* Whether a line of a header is read in the same way by everybody: a name of letters, digits and dashes, a colon, and no
 * control character before the line's end. The first line and the last have no name. */
static int plain_line(const char *line, const char *end, int first)
{
    if (end > line && end[-1] == '\n') {
        end--;
    }
    if (end > line && end[-1] == '\r') {
        end--;
    }
    const char *name = line;
    while (name < end && (*name == '-' || *name == '_' || (*name >= '0' && *name <= '9') ||
                          ((*name | 32) >= 'a' && (*name | 32) <= 'z'))) {
        name++;
    }
    if (!first && line < end && (name == line || name == end || *name != ':')) {
        return 0;
    }
    for (; line < end; line++) {
        if (((unsigned char)*line < 32 && *line != '\t') || *line == 127) {
            return 0;
        }
    }
    return 1;
}

/* Whether a header is, in each field that matters, what a range of this version has. Anything else is for Python
 * to judge: several such fields, odd lines, an encoding. tests/fuzz compares the two. */
static int as_expected(const job *j)
{
    int range = 0, etag = 0, size = 0;
    int64_t length;
    const char *line = j->head, *end = j->head + j->head_length;
    if (j->content_range == NULL || j->etag == NULL || j->status != 206) {
        return 0;
    }
    while (line < end) {
        const char *stop = memchr(line, '\n', (size_t)(end - line)), *value;
        stop = stop == NULL ? end : stop + 1;
        if (!plain_line(line, stop, line == j->head)) {
            return 0;
        }
        if ((value = value_of(line, stop, "Content-Range", &length)) != NULL) {
            range += same(value, length, j->content_range) ? 1 : 2;
        } else if ((value = value_of(line, stop, "ETag", &length)) != NULL) {
            etag += same(value, length, j->etag) ? 1 : 2;
        } else if ((value = value_of(line, stop, "Content-Length", &length)) != NULL) {
            /* A number in its one usual form; others are numbers as well, so Python has the word. */
            size += *value != '0' && number_of(value, length) == j->wanted ? 1 : 2;
        } else if (value_of(line, stop, "Content-Encoding", &length) != NULL ||
                   value_of(line, stop, "Transfer-Encoding", &length) != NULL) {
            return 0;
        }
        line = stop;
    }
    return range == 1 && etag == 1 && size == 1;
}

/* For the fuzzer as well: one line of a header. Returns 0 where the answer is not to be read on. */
EXPORTED int fetch_header_line(job *j, const char *line, int64_t size)
{
    if (j->judged) {
        return 1; /* a trailer */
    }
    if (size >= 5 && memcmp(line, "HTTP/", 5) == 0) {
        j->head_length = 0;
    }
    if (size > j->head_size - j->head_length) {
        j->end = LONG_HEADER;
        return 0;
    }
    memcpy(j->head + j->head_length, line, (size_t)size);
    j->head_length += size;
    if (!(size == 2 && line[0] == '\r') && !(size == 1 && line[0] == '\n')) {
        return 1;
    }
    j->status = status_of(j->head, j->head_length);
    if (j->status >= 100 && j->status < 200) {
        return 1;
    }
    j->judged = 1;
    if (as_expected(j)) {
        j->verdict = TAKE;
        j->finished = j->take == NULL && !j->room ? j->next() : 0;
    } else {
        j->verdict = j->judge();
        j->finished = j->verdict == DROP;
    }
    j->phase = j->verdict == COLLECT ? COLLECTING : RECEIVING;
    j->since = j->window_start = now();
    j->window_bytes = 0;
    if (j->finished) {
        j->end = BY_CALLBACK;
    }
    return !j->finished;
}

static size_t on_header(const char *line, size_t one, size_t count, handle *h)
{
    h->moved = 1;
    return fetch_header_line(h->j, line, (int64_t)(one * count)) ? one * count : 0;
}

/* The body --------------------------------------------------------------------------------------------------- */

static int64_t collected(job *j, const uint8_t *data, int64_t size)
{
    const int64_t room = j->document_size - j->document_length, count = size < room ? size : room;
    memcpy(j->document + j->document_length, data, (size_t)count);
    j->document_length += count;
    if (j->document_length == j->document_size) {
        j->finished = 1;
        j->end = BY_CALLBACK;
    }
    return count;
}

static int64_t taken(job *j, const uint8_t *data, int64_t size)
{
    int64_t left = size;
    if (j->take != NULL) {
        const int64_t count = j->take(j->sink, data, size);
        j->done += count;
        j->finished = *j->full != 0;
        return count;
    }
    while (left && !j->finished) {
        const int64_t count = left < j->room ? left : j->room;
        memcpy(j->out, data, (size_t)count);
        j->out += count;
        j->room -= count;
        j->done += count;
        data += count;
        left -= count;
        if (!j->room) {
            j->finished = j->next();
        }
    }
    return size - left;
}

static size_t on_body(const uint8_t *data, size_t one, size_t count, handle *h)
{
    job *j = h->j;
    const int64_t size = (int64_t)(one * count), began = now();
    int64_t used;
    h->moved = 1;
    if (h->broken_off) {
        j->end = BROKEN_OFF;
        return 0;
    }
    if (!j->judged || j->finished || j->verdict == DROP) {
        return 0;
    }
    if (j->verdict == COLLECT) {
        used = collected(j, data, size);
        return used == size ? (size_t)size : 0;
    }
    if (j->counter != NULL) {
        __atomic_fetch_add(j->counter, size, __ATOMIC_RELAXED);
    }
    used = taken(j, data, size);
    j->window_bytes += size;
    j->since = now();
    j->window_start += j->since - began; /* waiting for memory, and opening, are not the network's time */
    return used == size ? (size_t)size : 0;
}

/* Connections ------------------------------------------------------------------------------------------------ */

static int on_socket(handle *h, int purpose, void *address)
{
    (void)purpose;
    (void)address;
    h->fd = h->j->dial();
    h->j->since = now();
    return h->fd;
}

static int on_options(void *h, int fd, int purpose)
{
    (void)h;
    (void)fd;
    (void)purpose;
    return ALREADY_CONNECTED;
}

/* The connection is made, and the request is sent next. */
static int on_request(handle *h, const char *ip, const char *local, int port, int local_port)
{
    (void)ip;
    (void)local;
    (void)port;
    (void)local_port;
    h->j->phase = ASKED;
    h->j->since = now();
    return 0;
}

static int on_context(void *easy, void *context, handle *h)
{
    (void)easy;
    h->c->set_store(context, h->store);
    /* One call of the kernel for each TLS record, where OpenSSL reads five bytes of it first otherwise. What was read
     * ahead, libcurl before 8.15 does not look for: `drive` asks for it. */
    h->c->control(context, SET_READ_AHEAD, 1, NULL);
    h->c->control(context, CLEAR_MODE, RELEASE_BUFFERS, NULL);
    return h->suites != NULL && !h->c->set_suites(context, h->suites);
}

/* A handle keeps one connection to one place. `url`: scheme://host:port/. `proxy`: NULL for none. `resolve`: for
 * libcurl to look up nothing itself. `store`: OpenSSL's X509_STORE. NULL if there is no memory. */
EXPORTED int fetch_open(handle *h, const curl *c, const char *url, const char *const *resolve, const char *proxy,
                        int proxy_tls, int tunnel, const char *const *proxy_headers, void *store, const char *suites,
                        int64_t buffer)
{
    *h = (handle){.c = c, .store = store, .suites = suites, .fd = -1};
    h->easy = c->easy_init();
    h->multi = c->multi_init();
    if (h->easy == NULL || h->multi == NULL) {
        return -1;
    }
    while (*resolve != NULL) {
        h->lists[0] = c->append(h->lists[0], *resolve++);
    }
    while (*proxy_headers != NULL) {
        h->lists[1] = c->append(h->lists[1], *proxy_headers++);
    }
    int bad = 0;
#define SET(option, value) bad |= c->setopt(h->easy, option, value)
    SET(URL, url);
    SET(PATH_AS_IS, 1L);
    SET(PROTOCOLS, (long)HTTP_AND_HTTPS);
    SET(HTTP_VERSION, (long)HTTP_1_1);
    SET(NOSIGNAL, 1L);
    SET(BUFFERSIZE, (long)buffer);
    SET(HTTP_CONTENT_DECODING, 0L);
    SET(RESOLVE, h->lists[0]);
    SET(NOPROXY, "");
    SET(PROXY, proxy == NULL ? "" : proxy);
    if (proxy != NULL) {
        SET(SUPPRESS_CONNECT_HEADERS, 1L);
        SET(HEADEROPT, (long)SEPARATE);
        SET(HTTPPROXYTUNNEL, (long)tunnel);
        SET(PROXYHEADER, h->lists[1]);
    }
    if (proxy_tls) {
        SET(PROXYTYPE, (long)PROXY_HTTPS);
        SET(PROXY_CAINFO, NULL);
        SET(PROXY_CAPATH, NULL);
        SET(PROXY_SSLVERSION, (long)TLS_1_2);
    }
    if (store != NULL) {
        SET(CAINFO, NULL);
        SET(CAPATH, NULL);
        SET(SSLVERSION, (long)TLS_1_2);
        SET(SSL_CTX_FUNCTION, on_context);
        SET(SSL_CTX_DATA, h);
    }
    SET(OPENSOCKETFUNCTION, on_socket);
    SET(OPENSOCKETDATA, h);
    SET(SOCKOPTFUNCTION, on_options);
    SET(SOCKOPTDATA, h);
    SET(PREREQFUNCTION, on_request);
    SET(PREREQDATA, h);
    SET(HEADERFUNCTION, on_header);
    SET(HEADERDATA, h);
    SET(WRITEFUNCTION, on_body);
    SET(WRITEDATA, h);
    bad |= c->multi_setopt(h->multi, MULTI_MAXCONNECTS, 1L);
    return bad;
}

EXPORTED void fetch_close(handle *h)
{
    if (h->easy != NULL) {
        h->c->easy_cleanup(h->easy);
    }
    if (h->multi != NULL) {
        h->c->multi_cleanup(h->multi);
    }
    for (int i = 0; i < 2; i++) {
        h->c->free_list(h->lists[i]);
    }
    *h = (handle){0};
}

/* By any thread: end the call that is running. */
EXPORTED void fetch_break_off(handle *h)
{
    h->broken_off = 1;
    h->c->wakeup(h->multi);
}

/* What the phase allows has passed: an enum end; 0 otherwise, with the nanoseconds that are left. */
static int too_late(const job *j, int64_t *left)
{
    const int64_t at = now();
    const int64_t limit = j->phase == CONNECTING ? j->connect : j->stall;
    *left = j->since + limit - at;
    if (*left <= 0) {
        return j->phase == CONNECTING ? NO_CONNECTION : j->phase == COLLECTING ? SLOW_ERROR : STALLED;
    }
    return 0;
}

static int too_slow(job *j)
{
    const int64_t at = now(), elapsed = at - j->window_start;
    if (j->phase != RECEIVING || elapsed < j->stall) {
        return 0;
    }
    const int slow = (double)j->window_bytes < j->minimum_rate * ((double)elapsed / 1e9);
    j->window_start = at;
    j->window_bytes = 0;
    return slow;
}

static void drive(handle *h)
{
    const curl *c = h->c;
    job *j = h->j;
    int64_t left, ticked = now();
    h->moved = 0;
    for (;;) {
        int running = 0, any;
        /* Where something has come there may be more, in OpenSSL's memory too: libcurl is told to read until nothing
         * comes, without a look at the socket each time. */
        const int again = h->moved;
        h->moved = 0;
        if (again ? c->act(h->multi, h->fd, SELECT_IN, &running) : c->act_on_all(h->multi, &running)) {
            j->code = 2; /* CURLE_FAILED_INIT: only out of memory */
            return;
        }
        if (!running) {
            struct message *m = c->read(h->multi, &any);
            j->code = m != NULL && m->kind == DONE ? m->data.code : 2;
            return;
        }
        if (h->broken_off) {
            j->end = BROKEN_OFF;
            return;
        }
        if (j->finished) {
            return;
        }
        if ((j->end = too_late(j, &left)) != 0) {
            return;
        }
        if (too_slow(j)) {
            j->end = SLOW;
            return;
        }
        if (!h->moved) {
            if (j->tick && left > j->tick) {
                left = j->tick;
            }
            c->poll(h->multi, NULL, 0, (int)(left / 1000000 > 60000 ? 60000 : left / 1000000 + 1), &any);
        }
        if (j->tick && now() - ticked >= j->tick) {
            ticked = now();
            if (j->ticked()) {
                j->end = BY_CALLBACK;
                return;
            }
        }
    }
}

/* One request. Python holds no lock meanwhile, except in what it is called for. */
EXPORTED void fetch_run(handle *h, job *j)
{
    const curl *c = h->c;
    void *list = NULL;
    long status = 0;
    for (const char *const *header = j->headers; *header != NULL; header++) {
        list = c->append(list, *header);
    }
    h->j = j;
    j->out = NULL;
    j->room = j->done = j->head_length = j->document_length = j->document_size = 0;
    j->end = j->code = j->status = j->connect_status = 0;
    j->phase = j->verdict = j->judged = j->finished = 0;
    j->message[0] = 0;
    c->setopt(h->easy, REQUEST_TARGET, j->target);
    c->setopt(h->easy, HTTPHEADER, list);
    c->setopt(h->easy, ERRORBUFFER, j->message);
    j->since = now();
    if (c->add(h->multi, h->easy)) {
        j->code = 2;
    } else {
        drive(h);
        c->getinfo(h->easy, HTTP_CONNECTCODE, &status);
        j->connect_status = (int32_t)status;
        c->remove(h->multi, h->easy); /* closes the connection where the answer was not read to its end */
    }
    c->setopt(h->easy, HTTPHEADER, NULL);
    c->setopt(h->easy, ERRORBUFFER, NULL);
    c->free_list(list);
    h->j = NULL;
}

EXPORTED int64_t fetch_job_bytes(void)
{
    return sizeof(job);
}

EXPORTED int64_t fetch_handle_bytes(void)
{
    return sizeof(handle);
}
