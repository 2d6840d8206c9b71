/* Sees every change of a file, in order, over all processes: open for writing, write, fsync, rename, unlink. tests/events.py builds it.

   EVENTS_STATE names a file of `struct state`, which all processes map. Below `root`, each call gets the next number and a line in
   the log. Call number `at` is where a fault comes: the process group is killed, or the call fails with `fault` as its errno, or it
   writes half (SHORT). LD_PRELOAD loads this before libc. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

struct state { long next, at, fault, group; char root[1024], log[1024]; };
enum { KILL = -1, SHORT = -2 };
static struct state *state;

static struct state *mapped(void) {
    const char *name = getenv("EVENTS_STATE");
    if (!state && name) {
        int fd = syscall(SYS_openat, AT_FDCWD, name, O_RDWR | O_CLOEXEC);
        void *found = fd < 0 ? MAP_FAILED : mmap(0, sizeof *state, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (fd >= 0) syscall(SYS_close, fd);
        if (found != MAP_FAILED) state = found;
    }
    return state;
}

/* Counts a call. Returns the errno that it must fail with, SHORT, or 0. */
static long event(const char *what, const char *path, const char *to) {
    int before = errno;
    struct state *s = mapped();
    if (!s || !path || path[0] != '/' || strncmp(path, s->root, strlen(s->root)) || !s->root[0]) return errno = before, 0;
    long number = __sync_add_and_fetch(&s->next, 1);
    char line[4096];
    int length = snprintf(line, sizeof line, "%ld %d %s %s%s%s\n", number, getpid(), what, path, to ? " -> " : "", to ? to : "");
    int fd = syscall(SYS_openat, AT_FDCWD, s->log, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
    if (fd >= 0) { syscall(SYS_write, fd, line, length); syscall(SYS_close, fd); }
    errno = before;
    if (number != s->at) return 0;
    if (s->fault == KILL) { kill(s->group ? 0 : getpid(), SIGKILL); pause(); }
    return s->fault;
}

static const char *path_of(int fd, char *buffer) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    int n = readlink(link, buffer, 4095);
    return n < 0 ? NULL : (buffer[n] = 0, buffer);
}

static const char *whole(int folder, const char *path, char *buffer) {
    if (!path || path[0] == '/') return path;
    char top[4096];
    if (folder == AT_FDCWD ? !getcwd(top, sizeof top) : !path_of(folder, top)) return path;
    snprintf(buffer, 8192, "%s/%s", top, path);
    return buffer;
}

#define REAL(type, name, ...) static type (*real)(__VA_ARGS__); if (!real) real = (type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name)
#define FAIL(what, path, to) do { long e = event(what, path, to); if (e > 0) return errno = e, -1; } while (0)
#define MODE() va_list rest; va_start(rest, flags); int mode = (flags & O_CREAT) ? va_arg(rest, int) : 0; va_end(rest)
#define WRITES(flags) ((flags) & (O_WRONLY | O_RDWR))

static const char *opens(const char *path, int flags) { return (flags & O_CREAT) && access(path, F_OK) ? "create" : "open"; }

#define OPEN(name) int name(const char *path, int flags, ...) { MODE(); REAL(int, name, const char *, int, ...); char b[8192]; \
    if (WRITES(flags)) { const char *w = whole(AT_FDCWD, path, b); FAIL(opens(w, flags), w, NULL); } return real(path, flags, mode); }
#define OPENAT(name) int name(int folder, const char *path, int flags, ...) { MODE(); REAL(int, name, int, const char *, int, ...); char b[8192]; \
    if (WRITES(flags)) { const char *w = whole(folder, path, b); FAIL(opens(w, flags), w, NULL); } return real(folder, path, flags, mode); }
OPEN(open) OPEN(open64) OPENAT(openat) OPENAT(openat64)

#define WRITE(name, type, extra, pass) ssize_t name(int fd, const void *data, size_t size extra) { \
    REAL(ssize_t, name, int, const void *, size_t type); char b[4096]; long e = event("write", path_of(fd, b), NULL); \
    if (e > 0) return errno = e, -1; return real(fd, data, e == SHORT && size > 1 ? size / 2 : size pass); }
#define COMMA ,
WRITE(write, , , )
WRITE(pwrite, COMMA off_t, COMMA off_t at, COMMA at)
WRITE(pwrite64, COMMA off64_t, COMMA off64_t at, COMMA at)

#define SYNC(name) int name(int fd) { REAL(int, name, int); char b[4096]; FAIL("fsync", path_of(fd, b), NULL); return real(fd); }
SYNC(fsync) SYNC(fdatasync)

int rename(const char *from, const char *to) {
    REAL(int, rename, const char *, const char *); char a[8192], b[8192];
    FAIL("rename", whole(AT_FDCWD, from, a), whole(AT_FDCWD, to, b));
    return real(from, to);
}
int renameat(int f, const char *from, int t, const char *to) {
    REAL(int, renameat, int, const char *, int, const char *); char a[8192], b[8192];
    FAIL("rename", whole(f, from, a), whole(t, to, b));
    return real(f, from, t, to);
}
int unlink(const char *path) { REAL(int, unlink, const char *); char b[8192]; FAIL("unlink", whole(AT_FDCWD, path, b), NULL); return real(path); }
int unlinkat(int folder, const char *path, int flags) {
    REAL(int, unlinkat, int, const char *, int); char b[8192];
    FAIL("unlink", whole(folder, path, b), NULL);
    return real(folder, path, flags);
}
ssize_t sendfile(int out, int in, off_t *at, size_t size) {
    REAL(ssize_t, sendfile, int, int, off_t *, size_t); char b[4096];
    FAIL("write", path_of(out, b), NULL);
    return real(out, in, at, size);
}
int link(const char *from, const char *to) {
    REAL(int, link, const char *, const char *); char a[8192], b[8192];
    FAIL("link", whole(AT_FDCWD, to, b), whole(AT_FDCWD, from, a));
    return real(from, to);
}
