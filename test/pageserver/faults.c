/*
 * For tests: a disk that fails. Loaded before libc (LD_PRELOAD), it lets calls on files below STRATA_FAULT_DIRECTORY fail as the file
 * STRATA_FAULT_CONTROL says, 20 bytes that are mapped and may be written at any time (faulty-disk.ts):
 *
 *   offset  size  field (little-endian)
 *        0     4  what fails: FAULT_…; 0 nothing
 *        4     4  calls of that kind that still succeed; counted down
 *        8     4  how many fail then
 *       12     4  how many have failed; counted up
 *       16     4  by how many seconds the clock is ahead, signed
 *
 * With STRATA_FAULT_PROCESS, only in processes whose command line ends so.
 *
 * An fsync that fails loses what was written, as on Linux, where the pages count as clean afterwards: the file's last 64 KiB become zeroes, so that
 * whoever goes on with the file as if a second fsync had saved it is found out. A death (FAULT_DEATH) strikes before any call that changes a disk, whatever kind of call it
 * is: so a process can be killed between any two of them.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum {
  FAULT_NO_SPACE = 1,
  FAULT_SHORT_WRITE = 2,
  FAULT_WRITE_ERROR = 3,
  FAULT_FSYNC = 4,
  FAULT_FSYNC_DIRECTORY = 5,
  FAULT_RENAME = 6,
  FAULT_READ_ERROR = 7,
  FAULT_SHORT_READ = 8,
  FAULT_GARBAGE = 9,
  FAULT_UNLINK = 10,
  FAULT_OPEN = 11,
  FAULT_DEATH = 12,
};

struct control {
  _Atomic uint32_t kind, succeed, fail, failed;
  _Atomic int32_t clock_ahead;
};

static struct control *control;
static const char *directory;
static size_t directory_length;

/* Whether the command line, its arguments joined by spaces, ends with `end`. */
static int is_process(const char *end)
{
  char line[8192];
  int file = open("/proc/self/cmdline", O_RDONLY | O_CLOEXEC);
  ssize_t length = file < 0 ? 0 : read(file, line, sizeof line);
  close(file);
  for (ssize_t i = 0; i < length - 1; i++)
    if (line[i] == 0)
      line[i] = ' ';
  size_t end_length = strlen(end);
  return length > (ssize_t)end_length && strcmp(line + length - 1 - end_length, end) == 0;
}

__attribute__((constructor)) static void begin(void)
{
  const char *path = getenv("STRATA_FAULT_CONTROL");
  const char *process = getenv("STRATA_FAULT_PROCESS");
  if (process != NULL && !is_process(process))
    return;
  directory = getenv("STRATA_FAULT_DIRECTORY");
  if (path == NULL || directory == NULL)
    return;
  directory = strdup(directory);
  directory_length = strlen(directory);
  int file = open(path, O_RDWR | O_CLOEXEC);
  if (file < 0)
    return;
  void *mapped = mmap(NULL, sizeof(struct control), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  if (mapped != MAP_FAILED)
    control = mapped;
}

static int is_ours(const char *path)
{
  return path != NULL && strncmp(path, directory, directory_length) == 0;
}

static int is_our_file(int file)
{
  char name[64], path[4096];
  snprintf(name, sizeof name, "/proc/self/fd/%d", file);
  ssize_t length = readlink(name, path, sizeof path - 1);
  if (length <= 0)
    return 0;
  path[length] = 0;
  return is_ours(path);
}

/* Whether this call, on a file of ours, is to fail. */
static int strikes(uint32_t kind)
{
  uint32_t left = atomic_load(&control->succeed);
  while (left > 0)
    if (atomic_compare_exchange_weak(&control->succeed, &left, left - 1))
      return 0;
  uint32_t fail = atomic_load(&control->fail);
  while (fail > 0)
    if (atomic_compare_exchange_weak(&control->fail, &fail, fail - 1)) {
      atomic_fetch_add(&control->failed, 1);
      return 1;
    }
  (void)kind;
  return 0;
}

static int may_strike(uint32_t kind)
{
  return control != NULL && atomic_load(&control->kind) == kind;
}

static int fails_on_file(uint32_t kind, int file)
{
  return may_strike(kind) && is_our_file(file) && strikes(kind);
}

static int fails_on_path(uint32_t kind, const char *path)
{
  return may_strike(kind) && is_ours(path) && strikes(kind);
}

static void die(void)
{
  kill(getpid(), SIGKILL);
  for (;;)
    pause();
}

/* To be called before each change of the disk. */
static void may_die_on_file(int file)
{
  if (fails_on_file(FAULT_DEATH, file))
    die();
}

static void may_die_on_path(const char *path)
{
  if (fails_on_path(FAULT_DEATH, path))
    die();
}

#define REAL(name) \
  static typeof(name) *real; \
  if (real == NULL) \
    real = (typeof(name) *)dlsym(RTLD_NEXT, #name)

#define FAIL(error) \
  do { \
    errno = error; \
    return -1; \
  } while (0)

#define WRITE_FAULTS(file, length) \
  may_die_on_file(file); \
  if (fails_on_file(FAULT_NO_SPACE, file)) \
    FAIL(ENOSPC); \
  if (fails_on_file(FAULT_WRITE_ERROR, file)) \
    FAIL(EIO); \
  if (length > 1 && fails_on_file(FAULT_SHORT_WRITE, file)) \
    length /= 2

ssize_t write(int file, const void *bytes, size_t length)
{
  REAL(write);
  WRITE_FAULTS(file, length);
  return real(file, bytes, length);
}

ssize_t pwrite(int file, const void *bytes, size_t length, off_t offset)
{
  REAL(pwrite);
  WRITE_FAULTS(file, length);
  return real(file, bytes, length, offset);
}

ssize_t pwrite64(int file, const void *bytes, size_t length, off64_t offset)
{
  REAL(pwrite64);
  WRITE_FAULTS(file, length);
  return real(file, bytes, length, offset);
}

static size_t length_of(const struct iovec *parts, int count)
{
  size_t length = 0;
  for (int i = 0; i < count; i++)
    length += parts[i].iov_len;
  return length;
}

/* A short write of several parts writes the first of them. */
#define WRITEV_FAULTS(file, parts, count) \
  do { \
    size_t length = length_of(parts, count); \
    size_t wanted = length; \
    WRITE_FAULTS(file, length); \
    if (length < wanted && count > 1) \
      count = 1; \
  } while (0)

ssize_t writev(int file, const struct iovec *parts, int count)
{
  REAL(writev);
  WRITEV_FAULTS(file, parts, count);
  return real(file, parts, count);
}

ssize_t pwritev(int file, const struct iovec *parts, int count, off_t offset)
{
  REAL(pwritev);
  WRITEV_FAULTS(file, parts, count);
  return real(file, parts, count, offset);
}

ssize_t pwritev64(int file, const struct iovec *parts, int count, off64_t offset)
{
  REAL(pwritev64);
  WRITEV_FAULTS(file, parts, count);
  return real(file, parts, count, offset);
}

int ftruncate(int file, off_t length)
{
  REAL(ftruncate);
  may_die_on_file(file);
  return real(file, length);
}

static ssize_t read_faults(int file, void *bytes, ssize_t count)
{
  if (count > 0 && fails_on_file(FAULT_GARBAGE, file))
    for (ssize_t i = 0; i < count; i += 97)
      ((unsigned char *)bytes)[i] ^= 0x5a;
  return count;
}

#define READ_FAULTS(file, length) \
  if (fails_on_file(FAULT_READ_ERROR, file)) \
    FAIL(EIO); \
  if (length > 1 && fails_on_file(FAULT_SHORT_READ, file)) \
    length /= 2

ssize_t read(int file, void *bytes, size_t length)
{
  REAL(read);
  READ_FAULTS(file, length);
  return read_faults(file, bytes, real(file, bytes, length));
}

ssize_t pread(int file, void *bytes, size_t length, off_t offset)
{
  REAL(pread);
  READ_FAULTS(file, length);
  return read_faults(file, bytes, real(file, bytes, length, offset));
}

ssize_t pread64(int file, void *bytes, size_t length, off64_t offset)
{
  REAL(pread64);
  READ_FAULTS(file, length);
  return read_faults(file, bytes, real(file, bytes, length, offset));
}

/* Zeroes where the file's last writes went. */
static void lose(int file)
{
  static const char zeroes[65536];
  struct stat status;
  char name[64];
  if (fstat(file, &status) != 0 || !S_ISREG(status.st_mode))
    return;
  snprintf(name, sizeof name, "/proc/self/fd/%d", file);
  int other = open(name, O_WRONLY | O_CLOEXEC);
  if (other < 0)
    return;
  off_t length = status.st_size < (off_t)sizeof zeroes ? status.st_size : (off_t)sizeof zeroes;
  ssize_t (*real)(int, const void *, size_t, off_t) = dlsym(RTLD_NEXT, "pwrite");
  if (real(other, zeroes, length, status.st_size - length) < 0)
    abort();
  close(other);
}

static int sync_fails(int file)
{
  struct stat status;
  if (control == NULL || fstat(file, &status) != 0)
    return 0;
  if (fails_on_file(S_ISDIR(status.st_mode) ? FAULT_FSYNC_DIRECTORY : FAULT_FSYNC, file)) {
    lose(file);
    return 1;
  }
  return 0;
}

int fsync(int file)
{
  REAL(fsync);
  may_die_on_file(file);
  if (sync_fails(file))
    FAIL(EIO);
  return real(file);
}

int fdatasync(int file)
{
  REAL(fdatasync);
  may_die_on_file(file);
  if (sync_fails(file))
    FAIL(EIO);
  return real(file);
}

int rename(const char *from, const char *to)
{
  REAL(rename);
  may_die_on_path(to);
  if (fails_on_path(FAULT_RENAME, to))
    FAIL(EIO);
  return real(from, to);
}

int unlink(const char *path)
{
  REAL(unlink);
  may_die_on_path(path);
  if (fails_on_path(FAULT_UNLINK, path))
    FAIL(EIO);
  return real(path);
}

int link(const char *from, const char *to)
{
  REAL(link);
  may_die_on_path(to);
  return real(from, to);
}

int mkdir(const char *path, mode_t mode)
{
  REAL(mkdir);
  may_die_on_path(path);
  return real(path, mode);
}

int rmdir(const char *path)
{
  REAL(rmdir);
  may_die_on_path(path);
  return real(path);
}

/* What an open with these flags may change, or fail at. */
#define OPEN_FAULTS(path, flags) \
  do { \
    if ((flags & O_CREAT) != 0) { \
      may_die_on_path(path); \
      if (fails_on_path(FAULT_OPEN, path)) \
        FAIL(ENOSPC); \
    } \
  } while (0)

int open(const char *path, int flags, ...)
{
  REAL(open);
  mode_t mode = 0;
  if (flags & (O_CREAT | O_TMPFILE)) {
    __builtin_va_list list;
    __builtin_va_start(list, flags);
    mode = __builtin_va_arg(list, mode_t);
    __builtin_va_end(list);
  }
  OPEN_FAULTS(path, flags);
  return real(path, flags, mode);
}

int open64(const char *path, int flags, ...)
{
  REAL(open64);
  mode_t mode = 0;
  if (flags & (O_CREAT | O_TMPFILE)) {
    __builtin_va_list list;
    __builtin_va_start(list, flags);
    mode = __builtin_va_arg(list, mode_t);
    __builtin_va_end(list);
  }
  OPEN_FAULTS(path, flags);
  return real(path, flags, mode);
}

int clock_gettime(clockid_t clock, struct timespec *time)
{
  REAL(clock_gettime);
  int result = real(clock, time);
  if (control != NULL && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
    time->tv_sec += atomic_load(&control->clock_ahead);
  return result;
}

int gettimeofday(struct timeval *restrict time, void *restrict zone)
{
  REAL(gettimeofday);
  int result = real(time, zone);
  if (control != NULL)
    time->tv_sec += atomic_load(&control->clock_ahead);
  return result;
}
