/* How much processor time do threads take while they have the interpreter's lock? Preloaded (LD_PRELOAD) into CPython
 * 3.11, whose lock is an int behind a mutex: the mutex is let go of each time that the lock is taken or dropped. A
 * thread that has the lock and waits for a processor, or sleeps, adds nothing to `running`, but to `held`. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <time.h>

#define EXPORTED __attribute__((visibility("default")))

/* From the mutex back to the lock in struct _gil_runtime_state (pycore_gil.h): the condition and `switch_number`. */
#define BACK (sizeof(pthread_cond_t) + 2 * sizeof(unsigned long))

typedef struct {
    int64_t running, held; /* nanoseconds */
    int64_t taken;         /* how often */
} account;

static int (*unlock)(pthread_mutex_t *);
static pthread_mutex_t *mutex; /* the lock's; NULL: not known */
static pthread_mutex_t *volatile found;
static volatile int looking;
static account total;
static __thread struct {
    int64_t cpu, wall;
    int has;
} mine __attribute__((tls_model("initial-exec")));

static int64_t at(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void take(void)
{
    mine.has = 1;
    mine.wall = at(CLOCK_MONOTONIC);
    mine.cpu = at(CLOCK_THREAD_CPUTIME_ID);
}

static void drop(void)
{
    if (mine.has) {
        total.running += at(CLOCK_THREAD_CPUTIME_ID) - mine.cpu; /* who has the mutex is alone here */
        total.held += at(CLOCK_MONOTONIC) - mine.wall;
        total.taken++;
        mine.has = 0;
    }
}

static int locked(const pthread_mutex_t *one)
{
    return __atomic_load_n((const int *)((const char *)one - BACK), __ATOMIC_RELAXED);
}

EXPORTED int pthread_mutex_unlock(pthread_mutex_t *one)
{
    if (unlock == NULL) {
        unlock = (int (*)(pthread_mutex_t *))dlsym(RTLD_NEXT, "pthread_mutex_unlock");
    }
    if (one == mutex) {
        locked(one) ? take() : drop();
    } else if (looking && found == NULL) {
        found = one;
    }
    return unlock(one);
}

/* Called with the lock, by the only thread there is. 0, or -1 where the lock is not as in CPython 3.11. */
EXPORTED int meter_start(void *(*let_go)(void), void (*take_again)(void *))
{
    looking = 1;
    void *state = let_go(); /* its first mutex is the lock's */
    looking = 0;
    const int free_then = found != NULL && !locked(found);
    take_again(state);
    if (!free_then || !locked(found)) {
        return -1;
    }
    mutex = found;
    take();
    return 0;
}

/* Called with the lock. */
EXPORTED void meter_read(account *result)
{
    drop();
    *result = total;
    take();
}
