/*
 * For benchmarks: a disk whose flushes take longer, loaded before libc (LD_PRELOAD). After each fsync and fdatasync, and each write to a file that is open
 * with O_DSYNC or O_SYNC, the caller sleeps for STRATA_SYNC_DELAY_US microseconds more. Flushes of different callers do not wait for one another, as on a
 * disk that is reached over a network.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static struct timespec delay;

__attribute__((constructor)) static void begin(void)
{
  const char *text = getenv("STRATA_SYNC_DELAY_US");
  long us = text == NULL ? 0 : atol(text);
  delay.tv_sec = us / 1000000;
  delay.tv_nsec = us % 1000000 * 1000;
}

static void wait_for_disk(void)
{
  int error = errno;
  nanosleep(&delay, NULL);
  errno = error;
}

static ssize_t written(int file, ssize_t result)
{
  int error = errno;
  int flags = fcntl(file, F_GETFL);
  errno = error;
  if (result > 0 && flags >= 0 && (flags & O_DSYNC) != 0)
    wait_for_disk();
  return result;
}

#define REAL(name) \
  static typeof(name) *real; \
  if (real == NULL) \
    real = (typeof(name) *)dlsym(RTLD_NEXT, #name)

int fsync(int file)
{
  REAL(fsync);
  int result = real(file);
  wait_for_disk();
  return result;
}

int fdatasync(int file)
{
  REAL(fdatasync);
  int result = real(file);
  wait_for_disk();
  return result;
}

ssize_t pwrite(int file, const void *bytes, size_t length, off_t offset)
{
  REAL(pwrite);
  return written(file, real(file, bytes, length, offset));
}

ssize_t pwrite64(int file, const void *bytes, size_t length, off64_t offset)
{
  REAL(pwrite64);
  return written(file, real(file, bytes, length, offset));
}

ssize_t pwritev(int file, const struct iovec *parts, int count, off_t offset)
{
  REAL(pwritev);
  return written(file, real(file, parts, count, offset));
}

ssize_t pwritev64(int file, const struct iovec *parts, int count, off64_t offset)
{
  REAL(pwritev64);
  return written(file, real(file, parts, count, offset));
}
