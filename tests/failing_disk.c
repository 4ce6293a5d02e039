/* A disk that fails: loaded before the C library (LD_PRELOAD), its calls fail below one folder when they are told to.

   disk_fails(below, operation, after, error, times): from the `after`-th call of this kind below the folder on, `times`
   of them return -1 with errno `error`. operation: the first letter of the kind. disk_failed(): how many have;
   disk_seen(): how many of the kind were made.
   A write that runs out of room takes half of what it was given before, as a real one does. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static char below[4096];
static int operation, error_number;
static volatile int until, left, hits, seen;

void disk_fails(const char *folder, int kind, int after, int error, int times) {
    operation = 0;
    snprintf(below, sizeof below, "%s", folder);
    until = after, error_number = error, left = times, hits = seen = 0;
    operation = kind;
}

int disk_failed(void) { return hits; }
int disk_seen(void) { return seen; }

static int fails(int kind, const char *path) {
    if (kind != operation || !path || strncmp(path, below, strlen(below))) return 0;
    __sync_add_and_fetch(&seen, 1);
    if (__sync_sub_and_fetch(&until, 1) > 0 || __sync_sub_and_fetch(&left, 1) < 0) return 0;
    __sync_add_and_fetch(&hits, 1);
    errno = error_number;
    return 1;
}

static int fails_at(int kind, int descriptor) {
    char link[64], path[4096];
    if (kind != operation) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return fails(kind, path);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t write(int fd, const void *data, size_t size) {
    if (fails_at('w', fd)) return error_number == ENOSPC && size > 1 ? REAL(write)(fd, data, size / 2) : -1;
    return REAL(write)(fd, data, size);
}
ssize_t pread(int fd, void *data, size_t size, off_t at) { return fails_at('r', fd) ? -1 : REAL(pread)(fd, data, size, at); }
ssize_t pread64(int fd, void *data, size_t size, off64_t at) { return fails_at('r', fd) ? -1 : REAL(pread64)(fd, data, size, at); }
ssize_t read(int fd, void *data, size_t size) { return fails_at('r', fd) ? -1 : REAL(read)(fd, data, size); }
int fsync(int fd) { return fails_at('f', fd) ? -1 : REAL(fsync)(fd); }
int rename(const char *from, const char *to) { return fails('n', from) ? -1 : REAL(rename)(from, to); }
int mkdir(const char *path, mode_t mode) { return fails('m', path) ? -1 : REAL(mkdir)(path, mode); }
int unlink(const char *path) { return fails('u', path) ? -1 : REAL(unlink)(path); }
int unlinkat(int at, const char *path, int flags) { return fails_at('u', at) ? -1 : REAL(unlinkat)(at, path, flags); }

/* Opened to be written; for what is only read there is 'r'. */
static int opens(const char *path, int flags) { return (flags & O_ACCMODE) != O_RDONLY && fails('o', path); }
#define OPEN(name)                                            \
    int name(const char *path, int flags, ...) {              \
        va_list rest;                                         \
        va_start(rest, flags);                                \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest);                                         \
        return opens(path, flags) ? -1 : REAL(name)(path, flags, mode); \
    }
OPEN(open)
OPEN(open64)
