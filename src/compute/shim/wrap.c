/*
 * The libc calls by which Postgres opens relation files and reaches them by descriptor (by name: names.c). Each asks first whether the file is
 * one of the page map's; if it is, it makes the pages it needs present, or holds the claims it needs, and then lets the call proceed.
 * Everything else goes straight to libc.
 *
 * Which calls: those that `nm -D` shows in Postgres 15 to 18 and that can reach a relation file, the forms that other compilers' settings make
 * of them (…64, __…_chk, __open_2), and their neighbours, so that an extension or another libc version does not slip past.
 * Not covered, as no Postgres does it with relation files: mmap, io_uring (io_method must be worker or sync), splice, and libc's own stdio on
 * descriptors; fopen makes the whole file present first.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <unistd.h>

#include "shim.h"

/* Copies between descriptors are cut to this, so that no more is made present than is soon copied. */
#define MAX_COPY_BYTES (8u << 20)

struct real_calls real;

void resolve_real_calls(void)
{
#define RESOLVE(name) *(void **)&real.name = dlsym(RTLD_NEXT, #name)
	RESOLVE(open);
	RESOLVE(openat);
	RESOLVE(dup);
	RESOLVE(dup2);
	RESOLVE(dup3);
	RESOLVE(fcntl);
	RESOLVE(read);
	RESOLVE(readv);
	RESOLVE(pread);
	RESOLVE(preadv);
	RESOLVE(write);
	RESOLVE(writev);
	RESOLVE(pwrite);
	RESOLVE(pwritev);
	RESOLVE(ftruncate);
	RESOLVE(truncate);
	RESOLVE(posix_fallocate);
	RESOLVE(fallocate);
	RESOLVE(posix_fadvise);
	RESOLVE(copy_file_range);
	RESOLVE(sendfile);
	RESOLVE(unlink);
	RESOLVE(unlinkat);
	RESOLVE(rename);
	RESOLVE(fopen);
	RESOLVE(opendir);
	RESOLVE(access);
	RESOLVE(send);
	RESOLVE(recv);
	RESOLVE(epoll_wait);
	RESOLVE(stat);
	RESOLVE(lstat);
	*(void **)&real.xstat = dlsym(RTLD_NEXT, "__xstat");
	*(void **)&real.lxstat = dlsym(RTLD_NEXT, "__lxstat");
	RESOLVE(close);
#undef RESOLVE
}

/* --- descriptors --- */

static void forget(int fd)
{
	if (tracked(fd) != NULL) {
		pages_forget_fd(fd);
		open_files[fd].entry = NULL;
	}
}

/* The descriptor, or -1 with EMFILE. */
static int remember(int fd, const struct map_entry *entry, int flags)
{
	if (fd >= MAX_TRACKED_FD) {
		real.close(fd);
		errno = EMFILE;
		return -1;
	}
	open_files[fd] = (struct open_file){.entry = entry, .flags = flags};
	return fd;
}

static int remember_duplicate(int from, int to)
{
	if (to < 0 || to == from)
		return to;
	forget(to);
	struct open_file *file = tracked(from);
	return file == NULL ? to : remember(to, file->entry, file->flags);
}

/* The name belongs to a file that this compute made: nothing of the old one may ever come back. */
static void leave_to_local(const struct map_entry *entry)
{
	struct claim claim;
	if (pages_claim(&claim, entry, 0, entry->blocks) == 0)
		pages_release(&claim, entry->blocks);
	atomic_store(map_name(entry), NAME_GONE);
}

static bool has_mode(int flags) { return (flags & O_CREAT) != 0 || (flags & O_TMPFILE) == O_TMPFILE; }

static int open_at(int directory, const char *path, int flags, mode_t mode)
{
	ready();
	const struct map_entry *entry = NULL;
	char full[PATH_MAX];
	if (config.active && path != NULL) {
		const char *named = path;
		if (directory != AT_FDCWD && path[0] != '/') {
			char link[40];
			snprintf(link, sizeof link, "/proc/self/fd/%d", directory);
			ssize_t length = readlink(link, full, sizeof full - 1);
			size_t rest = strnlen(path, PATH_MAX);
			named = NULL;
			if (length > 0 && (size_t)length + rest + 2 <= sizeof full) {
				full[length] = '/';
				memcpy(full + length + 1, path, rest + 1);
				named = full;
			}
		}
		entry = map_find_path(named);
		if (entry != NULL && files_make(entry, named) != 0)
			return -1;
		if (entry != NULL && (flags & O_TRUNC) != 0 && !map_is_gone(entry) && truncate(named, 0) != 0 && errno != ENOENT)
			return -1;
	}
	int fd = directory == AT_FDCWD ? real.open(path, flags, mode) : real.openat(directory, path, flags, mode);
	if (fd < 0)
		return fd;
	forget(fd);
	if (entry == NULL || map_is_gone(entry) || (flags & O_PATH) != 0)
		return fd;
	if ((flags & (O_CREAT | O_EXCL)) == (O_CREAT | O_EXCL)) {
		leave_to_local(entry);
		return fd;
	}
	return remember(fd, entry, flags);
}

static mode_t mode_argument(int flags, va_list args) { return has_mode(flags) ? va_arg(args, mode_t) : 0; }

EXPORT int open(const char *path, int flags, ...)
{
	va_list args;
	va_start(args, flags);
	mode_t mode = mode_argument(flags, args);
	va_end(args);
	return open_at(AT_FDCWD, path, flags, mode);
}
int open64(const char *path, int flags, ...) EXPORT_ALIAS("open");

EXPORT int openat(int directory, const char *path, int flags, ...)
{
	va_list args;
	va_start(args, flags);
	mode_t mode = mode_argument(flags, args);
	va_end(args);
	return open_at(directory, path, flags, mode);
}
int openat64(int directory, const char *path, int flags, ...) EXPORT_ALIAS("openat");

int __open_2(const char *path, int flags);
EXPORT int __open_2(const char *path, int flags) { return open_at(AT_FDCWD, path, flags, 0); }
int __open64_2(const char *path, int flags) EXPORT_ALIAS("__open_2");
int __openat_2(int directory, const char *path, int flags);
EXPORT int __openat_2(int directory, const char *path, int flags) { return open_at(directory, path, flags, 0); }
int __openat64_2(int directory, const char *path, int flags) EXPORT_ALIAS("__openat_2");

EXPORT int creat(const char *path, mode_t mode) { return open_at(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode); }
int creat64(const char *path, mode_t mode) EXPORT_ALIAS("creat");

EXPORT int close(int fd)
{
	ready();
	if (fd >= 0 && fd == wire_fd()) { /* whoever closes every number in sight does not mean ours */
		errno = EBADF;
		return -1;
	}
	forget(fd);
	return real.close(fd);
}

EXPORT int dup(int fd)
{
	ready();
	return remember_duplicate(fd, real.dup(fd));
}

EXPORT int dup2(int fd, int to)
{
	ready();
	if (to >= 0 && to == wire_fd() && fd != to)
		wire_drop();
	return remember_duplicate(fd, real.dup2(fd, to));
}

EXPORT int dup3(int fd, int to, int flags)
{
	ready();
	if (to >= 0 && to == wire_fd() && fd != to)
		wire_drop();
	return remember_duplicate(fd, real.dup3(fd, to, flags));
}

EXPORT int fcntl(int fd, int command, ...)
{
	ready();
	va_list args;
	va_start(args, command);
	void *argument = va_arg(args, void *);
	va_end(args);
	int result = real.fcntl(fd, command, argument);
	if (command == F_DUPFD || command == F_DUPFD_CLOEXEC)
		return remember_duplicate(fd, result);
	if (command == F_SETFL && result == 0 && tracked(fd) != NULL) {
		int flags = (int)(intptr_t)argument;
		open_files[fd].flags = (open_files[fd].flags & ~O_APPEND) | (flags & O_APPEND);
	}
	return result;
}
int fcntl64(int fd, int command, ...) EXPORT_ALIAS("fcntl");

/* --- reading --- */

static uint32_t block_limit(uint64_t offset) { return offset / PAGE_SIZE_BYTES > UINT32_MAX ? UINT32_MAX : (uint32_t)(offset / PAGE_SIZE_BYTES); }

static uint32_t first_block(off_t offset) { return block_limit((uint64_t)offset); }

static uint32_t end_block(off_t offset, size_t length)
{
	uint64_t end = (uint64_t)offset + length;
	if (end < (uint64_t)offset || end > INT64_MAX)
		end = INT64_MAX;
	return block_limit(end + PAGE_SIZE_BYTES - 1);
}

/* The bytes are about to be read. -1 and errno when they cannot be had. */
static int before_read(int fd, off_t offset, size_t length)
{
	struct open_file *file = tracked(fd);
	if (file == NULL || offset < 0 || length == 0)
		return 0;
	uint32_t first = first_block(offset), end = end_block(offset, length);
	if (pages_ensure(fd, first, end) != 0)
		return -1;
	file->read_end = end;
	return 0;
}

static size_t total_of(const struct iovec *parts, int count)
{
	size_t total = 0;
	for (int i = 0; i < count; i++)
		total += parts[i].iov_len;
	return total;
}

static off_t position_of(int fd) { return lseek(fd, 0, SEEK_CUR); }

EXPORT ssize_t read(int fd, void *to, size_t length)
{
	ready();
	if (tracked(fd) != NULL && before_read(fd, position_of(fd), length) != 0)
		return -1;
	return real.read(fd, to, length);
}

EXPORT ssize_t readv(int fd, const struct iovec *parts, int count)
{
	ready();
	if (tracked(fd) != NULL && before_read(fd, position_of(fd), total_of(parts, count)) != 0)
		return -1;
	return real.readv(fd, parts, count);
}

EXPORT ssize_t pread(int fd, void *to, size_t length, off_t offset)
{
	ready();
	return before_read(fd, offset, length) != 0 ? -1 : real.pread(fd, to, length, offset);
}
ssize_t pread64(int fd, void *to, size_t length, off_t offset) EXPORT_ALIAS("pread");

EXPORT ssize_t preadv(int fd, const struct iovec *parts, int count, off_t offset)
{
	ready();
	if (tracked(fd) != NULL && before_read(fd, offset, total_of(parts, count)) != 0)
		return -1;
	return real.preadv(fd, parts, count, offset);
}
ssize_t preadv64(int fd, const struct iovec *parts, int count, off_t offset) EXPORT_ALIAS("preadv");

/* What compilers make of read and pread when they know the buffer's size. */
extern void __chk_fail(void) __attribute__((noreturn));
ssize_t __read_chk(int fd, void *to, size_t length, size_t size);
EXPORT ssize_t __read_chk(int fd, void *to, size_t length, size_t size)
{
	if (length > size)
		__chk_fail();
	return read(fd, to, length);
}
ssize_t __pread_chk(int fd, void *to, size_t length, off_t offset, size_t size);
EXPORT ssize_t __pread_chk(int fd, void *to, size_t length, off_t offset, size_t size)
{
	if (length > size)
		__chk_fail();
	return pread(fd, to, length, offset);
}
ssize_t __pread64_chk(int fd, void *to, size_t length, off_t offset, size_t size) EXPORT_ALIAS("__pread_chk");

/* --- writing --- */

/* Claims over one write; `claim.entry` is NULL when nothing had to be claimed. */
struct write_guard {
	struct claim claim;
	uint64_t offset;
};

/* Blocks that the write covers wholly are claimed; those it covers in part are made present, as their other bytes stay. */
static int before_write(struct write_guard *guard, int fd, off_t offset, size_t length)
{
	guard->claim.entry = NULL;
	struct open_file *file = tracked(fd);
	if (file == NULL || length == 0)
		return 0;
	struct stat status;
	if ((file->flags & O_APPEND) != 0)
		offset = fstat(fd, &status) == 0 ? status.st_size : -1;
	if (offset < 0)
		return 0;
	uint32_t first = first_block(offset), end = end_block(offset, length);
	if (pages_all_present(file->entry, first, end))
		return 0;
	uint64_t stop = (uint64_t)offset + length;
	if (offset % PAGE_SIZE_BYTES != 0 && pages_ensure(fd, first, first + 1) != 0)
		return -1;
	if (stop % PAGE_SIZE_BYTES != 0 && pages_ensure(fd, end - 1, end) != 0)
		return -1;
	guard->offset = (uint64_t)offset;
	if (pages_claim(&guard->claim, file->entry, first, end) != 0) {
		guard->claim.entry = NULL;
		return -1;
	}
	return 0;
}

static ssize_t after_write(struct write_guard *guard, ssize_t written)
{
	if (guard->claim.entry != NULL)
		pages_release(&guard->claim, written <= 0 ? 0 : block_limit(guard->offset + (uint64_t)written));
	return written;
}

EXPORT ssize_t write(int fd, const void *from, size_t length)
{
	ready();
	struct write_guard guard;
	if (tracked(fd) == NULL)
		return real.write(fd, from, length);
	if (before_write(&guard, fd, position_of(fd), length) != 0)
		return -1;
	return after_write(&guard, real.write(fd, from, length));
}

EXPORT ssize_t writev(int fd, const struct iovec *parts, int count)
{
	ready();
	struct write_guard guard;
	if (tracked(fd) == NULL)
		return real.writev(fd, parts, count);
	if (before_write(&guard, fd, position_of(fd), total_of(parts, count)) != 0)
		return -1;
	return after_write(&guard, real.writev(fd, parts, count));
}

EXPORT ssize_t pwrite(int fd, const void *from, size_t length, off_t offset)
{
	ready();
	struct write_guard guard;
	if (before_write(&guard, fd, offset, length) != 0)
		return -1;
	return after_write(&guard, real.pwrite(fd, from, length, offset));
}
ssize_t pwrite64(int fd, const void *from, size_t length, off_t offset) EXPORT_ALIAS("pwrite");

EXPORT ssize_t pwritev(int fd, const struct iovec *parts, int count, off_t offset)
{
	ready();
	struct write_guard guard;
	if (tracked(fd) == NULL)
		return real.pwritev(fd, parts, count, offset);
	if (before_write(&guard, fd, offset, total_of(parts, count)) != 0)
		return -1;
	return after_write(&guard, real.pwritev(fd, parts, count, offset));
}
ssize_t pwritev64(int fd, const struct iovec *parts, int count, off_t offset) EXPORT_ALIAS("pwritev");

/* --- cutting --- */

static uint32_t first_cut_block(off_t length) { return block_limit((uint64_t)length + PAGE_SIZE_BYTES - 1); }

EXPORT int ftruncate(int fd, off_t length)
{
	ready();
	struct open_file *file = tracked(fd);
	if (file == NULL || length < 0)
		return real.ftruncate(fd, length);
	if (length % PAGE_SIZE_BYTES != 0 && pages_ensure(fd, first_block(length), first_block(length) + 1) != 0)
		return -1;
	uint32_t cut = first_cut_block(length);
	if (pages_all_present(file->entry, cut, file->entry->blocks))
		return real.ftruncate(fd, length);
	struct claim claim;
	if (pages_claim(&claim, file->entry, cut, file->entry->blocks) != 0)
		return -1;
	int result = real.ftruncate(fd, length);
	pages_release(&claim, result == 0 ? file->entry->blocks : 0);
	return result;
}
int ftruncate64(int fd, off_t length) EXPORT_ALIAS("ftruncate");

/* --- space, advice and copies inside the kernel --- */

EXPORT int posix_fallocate(int fd, off_t offset, off_t length)
{
	ready();
	/* libc's own way, where the file system cannot, reads and writes a byte of each page. */
	if (tracked(fd) != NULL && offset >= 0 && length > 0 && pages_ensure(fd, first_block(offset), end_block(offset, (size_t)length)) != 0)
		return errno;
	return real.posix_fallocate(fd, offset, length);
}
int posix_fallocate64(int fd, off_t offset, off_t length) EXPORT_ALIAS("posix_fallocate");

EXPORT int fallocate(int fd, int mode, off_t offset, off_t length)
{
	ready();
	if (tracked(fd) != NULL && (mode & ~FALLOC_FL_KEEP_SIZE) != 0 && offset >= 0 && pages_ensure(fd, first_block(offset), UINT32_MAX) != 0)
		return -1;
	return real.fallocate(fd, mode, offset, length);
}
int fallocate64(int fd, int mode, off_t offset, off_t length) EXPORT_ALIAS("fallocate");

EXPORT int posix_fadvise(int fd, off_t offset, off_t length, int advice)
{
	ready();
	if (advice == POSIX_FADV_WILLNEED && tracked(fd) != NULL && offset >= 0 && length >= 0) {
		uint32_t first = first_block(offset), end = length == 0 ? first + MAX_RUN : end_block(offset, (size_t)length);
		if (!pages_all_present(open_files[fd].entry, first, end)) {
			pages_prefetch(fd, first, end);
			return 0;
		}
	}
	return real.posix_fadvise(fd, offset, length, advice);
}
int posix_fadvise64(int fd, off_t offset, off_t length, int advice) EXPORT_ALIAS("posix_fadvise");

/* Both ends of a copy are made present; how much of `length` may be copied, or 0 and errno. */
static size_t before_copy(int from, const off_t *from_offset, int to, const off_t *to_offset, size_t length)
{
	bool reads = tracked(from) != NULL, writes = tracked(to) != NULL;
	if ((reads || writes) && length > MAX_COPY_BYTES)
		length = MAX_COPY_BYTES;
	if (reads && before_read(from, from_offset == NULL ? position_of(from) : *from_offset, length) != 0)
		return 0;
	if (writes) {
		off_t at = to_offset == NULL ? position_of(to) : *to_offset;
		if (at >= 0 && pages_ensure(to, first_block(at), end_block(at, length)) != 0)
			return 0;
	}
	return length;
}

EXPORT ssize_t copy_file_range(int from, off_t *from_offset, int to, off_t *to_offset, size_t length, unsigned flags)
{
	ready();
	size_t allowed = before_copy(from, from_offset, to, to_offset, length);
	return allowed == 0 && length > 0 ? -1 : real.copy_file_range(from, from_offset, to, to_offset, allowed, flags);
}

EXPORT ssize_t sendfile(int to, int from, off_t *offset, size_t length)
{
	ready();
	size_t allowed = before_copy(from, offset, to, NULL, length);
	return allowed == 0 && length > 0 ? -1 : real.sendfile(to, from, offset, allowed);
}
ssize_t sendfile64(int to, int from, off_t *offset, size_t length) EXPORT_ALIAS("sendfile");
