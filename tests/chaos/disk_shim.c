/* Counts the changes that a process and its children make to files below a directory, and lets chosen ones fail.
 *
 * DISK_SHIM names a control file, which all processes map and share. Its owner (shim.py) may change it at any time:
 *
 *   count    changes so far; reads do not count, for they change nothing
 *   first    the changes from `first` to `last` meet `action`; 0: none does
 *   last
 *   action   KILL: SIGKILL in place of the change; TORN: half of a write, then SIGKILL, and SIGKILL in place of any
 *            other change; a positive number: the change fails with that errno
 *   logging  not 0: each change gets a line in the file NAME.log
 *   below    only paths below this directory count
 *   part     only paths that contain this string count
 *
 * Interposed by LD_PRELOAD; test equipment, no part of the product.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { KILL = -1, TORN = -2 };

static struct control {
    _Atomic long count;
    long first, last, action, logging;
    char below[1024], part[256];
} *control;

static char log_path[PATH_MAX];

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

__attribute__((constructor)) static void begin(void) {
    const char *file = getenv("DISK_SHIM");
    if (!file) return;
    int fd = REAL(open)(file, O_RDWR | O_CLOEXEC);
    if (fd < 0) abort();
    void *mapped = mmap(NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (mapped == MAP_FAILED) abort();
    REAL(close)(fd);
    snprintf(log_path, sizeof log_path, "%s.log", file);
    control = mapped;
}

static int counts(const char *path) {
    size_t length = strlen(control->below);
    if (!length || strncmp(path, control->below, length) || (path[length] != '/' && path[length])) return 0;
    return !control->part[0] || strstr(path, control->part);
}

static void die(void) {
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

static void log_change(long number, const char *change, const char *path) {
    char line[PATH_MAX + 64];
    int size = snprintf(line, sizeof line, "%ld %d %s %s\n", number, (int)getpid(), change, path);
    int fd = REAL(open)(log_path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0644);
    if (fd < 0) return;
    ssize_t written = REAL(write)(fd, line, size);
    (void)written;
    REAL(close)(fd);
}

/* 0: go on; 1: fail, errno is set; 2: write half, then die. */
static int meet(const char *change, const char *path) {
    if (!counts(path)) return 0;
    long number = atomic_fetch_add(&control->count, 1) + 1, action = control->action;
    if (control->logging) log_change(number, change, path);
    if (!control->first || number < control->first || number > control->last) return 0;
    if (action == KILL) die();
    if (action == TORN) {
        if (!strstr(change, "write")) die();
        return 2;
    }
    errno = (int)action;
    return 1;
}

static int at_path(const char *change, int base, const char *path) {
    char full[2 * PATH_MAX], here[PATH_MAX];
    if (!control || !path) return 0;
    if (path[0] == '/') return meet(change, path);
    if (base == AT_FDCWD) {
        if (!getcwd(here, sizeof here)) return 0;
    } else {
        char link[64];
        snprintf(link, sizeof link, "/proc/self/fd/%d", base);
        ssize_t size = readlink(link, here, sizeof here - 1);
        if (size < 0) return 0;
        here[size] = 0;
    }
    snprintf(full, sizeof full, "%s/%s", here, path);
    return meet(change, full);
}

static int at_fd(const char *change, int fd) {
    char link[64], path[PATH_MAX];
    if (!control) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    int before = errno;
    ssize_t size = readlink(link, path, sizeof path - 1);
    errno = before;
    if (size < 0) return 0;
    path[size] = 0;
    return meet(change, path);
}

static int opened(const char *name, int base, const char *path, int flags, mode_t mode) {
    if (flags & (O_CREAT | O_TRUNC) && at_path("open", base, path)) return -1;
    int (*real)(int, const char *, int, ...) = (int (*)(int, const char *, int, ...))dlsym(RTLD_NEXT, name);
    return real(base, path, flags, mode);
}

#define MODE_ARGUMENT                                \
    mode_t mode = 0;                                 \
    if (flags & (O_CREAT | O_TMPFILE)) {             \
        va_list list;                                \
        va_start(list, flags);                       \
        mode = va_arg(list, mode_t);                 \
        va_end(list);                                \
    }

int open(const char *path, int flags, ...) {
    MODE_ARGUMENT
    return opened("openat", AT_FDCWD, path, flags, mode);
}
int open64(const char *path, int flags, ...) {
    MODE_ARGUMENT
    return opened("openat64", AT_FDCWD, path, flags, mode);
}
int openat(int base, const char *path, int flags, ...) {
    MODE_ARGUMENT
    return opened("openat", base, path, flags, mode);
}
int openat64(int base, const char *path, int flags, ...) {
    MODE_ARGUMENT
    return opened("openat64", base, path, flags, mode);
}
FILE *fopen(const char *path, const char *mode) {
    if (mode[0] == 'w' && at_path("open", AT_FDCWD, path)) return NULL;
    return REAL(fopen)(path, mode);
}
FILE *fopen64(const char *path, const char *mode) {
    if (mode[0] == 'w' && at_path("open", AT_FDCWD, path)) return NULL;
    return REAL(fopen64)(path, mode);
}
ssize_t write(int fd, const void *data, size_t size) {
    int verdict = at_fd("write", fd);
    if (verdict == 1) return -1;
    if (verdict == 2) {
        ssize_t half = REAL(write)(fd, data, size / 2);
        (void)half;
        die();
    }
    return REAL(write)(fd, data, size);
}
ssize_t writev(int fd, const struct iovec *parts, int parts_count) {
    int verdict = at_fd("writev", fd);
    if (verdict == 1) return -1;
    if (verdict == 2) {
        ssize_t half = parts_count ? REAL(write)(fd, parts[0].iov_base, parts[0].iov_len / 2) : 0;
        (void)half;
        die();
    }
    return REAL(writev)(fd, parts, parts_count);
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t offset) {
    int verdict = at_fd("pwrite", fd);
    if (verdict == 1) return -1;
    if (verdict == 2) {
        ssize_t half = REAL(pwrite)(fd, data, size / 2, offset);
        (void)half;
        die();
    }
    return REAL(pwrite)(fd, data, size, offset);
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset) { return pwrite(fd, data, size, offset); }
ssize_t sendfile(int to, int from, off_t *offset, size_t size) {
    return at_fd("sendfile", to) ? -1 : REAL(sendfile)(to, from, offset, size);
}
ssize_t sendfile64(int to, int from, off64_t *offset, size_t size) { return sendfile(to, from, offset, size); }
ssize_t copy_file_range(int from, off64_t *from_offset, int to, off64_t *to_offset, size_t size, unsigned flags) {
    if (at_fd("copy_file_range", to)) return -1;
    return REAL(copy_file_range)(from, from_offset, to, to_offset, size, flags);
}
int ftruncate(int fd, off_t size) { return at_fd("ftruncate", fd) ? -1 : REAL(ftruncate)(fd, size); }
int ftruncate64(int fd, off64_t size) { return at_fd("ftruncate", fd) ? -1 : REAL(ftruncate64)(fd, size); }
int fsync(int fd) { return at_fd("fsync", fd) ? -1 : REAL(fsync)(fd); }
int fdatasync(int fd) { return at_fd("fdatasync", fd) ? -1 : REAL(fdatasync)(fd); }
int rename(const char *from, const char *to) { return at_path("rename", AT_FDCWD, to) ? -1 : REAL(rename)(from, to); }
int renameat(int from_base, const char *from, int to_base, const char *to) {
    return at_path("rename", to_base, to) ? -1 : REAL(renameat)(from_base, from, to_base, to);
}
int link(const char *from, const char *to) { return at_path("link", AT_FDCWD, to) ? -1 : REAL(link)(from, to); }
int linkat(int from_base, const char *from, int to_base, const char *to, int flags) {
    return at_path("link", to_base, to) ? -1 : REAL(linkat)(from_base, from, to_base, to, flags);
}
int symlink(const char *target, const char *path) {
    return at_path("symlink", AT_FDCWD, path) ? -1 : REAL(symlink)(target, path);
}
int symlinkat(const char *target, int base, const char *path) {
    return at_path("symlink", base, path) ? -1 : REAL(symlinkat)(target, base, path);
}
int unlink(const char *path) { return at_path("unlink", AT_FDCWD, path) ? -1 : REAL(unlink)(path); }
int unlinkat(int base, const char *path, int flags) {
    return at_path(flags & AT_REMOVEDIR ? "rmdir" : "unlink", base, path) ? -1 : REAL(unlinkat)(base, path, flags);
}
int mkdir(const char *path, mode_t mode) { return at_path("mkdir", AT_FDCWD, path) ? -1 : REAL(mkdir)(path, mode); }
int mkdirat(int base, const char *path, mode_t mode) {
    return at_path("mkdir", base, path) ? -1 : REAL(mkdirat)(base, path, mode);
}
int rmdir(const char *path) { return at_path("rmdir", AT_FDCWD, path) ? -1 : REAL(rmdir)(path); }
