/*
 * The libc calls by which Postgres reaches relation files by name, besides open: cutting, removing, renaming, looking at them, and listing
 * their folders.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

#include "shim.h"

/* The entry of a path whose file may still have absent pages. */
static const struct map_entry *live_entry(const char *path)
{
	if (!config.active)
		return NULL;
	const struct map_entry *entry = map_find_path(path);
	return entry != NULL && !map_is_gone(entry) ? entry : NULL;
}

/* --- cutting --- */

EXPORT int truncate(const char *path, off_t length)
{
	ready();
	if (length < 0 || live_entry(path) == NULL)
		return real.truncate(path, length);
	int fd = open(path, O_RDWR | O_CLOEXEC);
	if (fd < 0)
		return -1;
	int result = ftruncate(fd, length);
	int error = errno;
	close(fd);
	errno = error;
	return result;
}
int truncate64(const char *path, off_t length) EXPORT_ALIAS("truncate");

/* --- removing and renaming --- */

/*
 * Takes the name away from the entry's file: by unlink, or by renaming another file over it. When that is done the name is wholly
 * local. When it is not, the file and what it lacks stay as they were.
 */
static int replace_name(const struct map_entry *entry, const char *path, const char *renamed_from)
{
	struct claim claim;
	if (files_forgo(entry))
		return renamed_from == NULL ? 0 : real.rename(renamed_from, path);
	if (pages_claim(&claim, entry, 0, entry->blocks) != 0)
		return -1;
	int result = renamed_from == NULL ? real.unlink(path) : real.rename(renamed_from, path);
	bool replaced = result == 0 || (renamed_from == NULL && errno == ENOENT);
	if (replaced)
		atomic_store(map_name(entry), NAME_GONE);
	pages_release(&claim, replaced ? entry->blocks : 0);
	return result;
}

EXPORT int unlink(const char *path)
{
	ready();
	const struct map_entry *entry = live_entry(path);
	return entry == NULL ? real.unlink(path) : replace_name(entry, path, NULL);
}

EXPORT int unlinkat(int directory, const char *path, int flags)
{
	ready();
	if ((directory == AT_FDCWD || path[0] == '/') && (flags & AT_REMOVEDIR) == 0)
		return unlink(path);
	return real.unlinkat(directory, path, flags);
}

/* Makes the whole file present; without one (ENOENT) there is nothing to do. */
static int ensure_whole(const char *path)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return errno == ENOENT ? 0 : -1;
	int result = tracked(fd) == NULL ? 0 : pages_ensure(fd, 0, UINT32_MAX);
	int error = errno;
	close(fd);
	errno = error;
	return result;
}

EXPORT int rename(const char *from, const char *to)
{
	ready();
	const struct map_entry *source = live_entry(from), *target = live_entry(to);
	if (source != NULL && source == target)
		return real.rename(from, to);
	if (source != NULL && ensure_whole(from) != 0) /* under its new name nobody would know what it lacks */
		return -1;
	int result = target == NULL ? real.rename(from, to) : replace_name(target, to, from);
	if (result == 0 && source != NULL)
		atomic_store(map_name(source), NAME_GONE);
	return result;
}

/* Stdio reads past the shim, so a file that is opened by it is made whole first. */
EXPORT FILE *fopen(const char *path, const char *mode)
{
	ready();
	if (live_entry(path) != NULL) {
		bool cuts = mode != NULL && mode[0] == 'w';
		if (cuts ? truncate(path, 0) != 0 && errno != ENOENT : ensure_whole(path) != 0)
			return NULL;
	}
	return real.fopen(path, mode);
}
FILE *fopen64(const char *path, const char *mode) EXPORT_ALIAS("fopen");

/* --- looking at files and folders --- */

/* True when the file may be looked at: it is none of ours, or it is there now. */
static bool may_look(const char *path)
{
	ready();
	const struct map_entry *entry = live_entry(path);
	return entry == NULL || files_make(entry, path) == 0;
}

EXPORT int access(const char *path, int mode) { return may_look(path) ? real.access(path, mode) : -1; }

/* Older libc versions have __xstat and __lxstat in place of stat and lstat. */
#define STAT_VERSION 1

EXPORT int stat(const char *path, struct stat *status)
{
	if (!may_look(path))
		return -1;
	return real.stat != NULL ? real.stat(path, status) : real.xstat(STAT_VERSION, path, status);
}
EXPORT int stat64(const char *path, struct stat64 *status) { return stat(path, (struct stat *)status); }
int __xstat(int version, const char *path, struct stat *status);
EXPORT int __xstat(int version, const char *path, struct stat *status) { return (void)version, stat(path, status); }
int __xstat64(int version, const char *path, struct stat *status) EXPORT_ALIAS("__xstat");

EXPORT int lstat(const char *path, struct stat *status)
{
	if (!may_look(path))
		return -1;
	return real.lstat != NULL ? real.lstat(path, status) : real.lxstat(STAT_VERSION, path, status);
}
EXPORT int lstat64(const char *path, struct stat64 *status) { return lstat(path, (struct stat *)status); }
int __lxstat(int version, const char *path, struct stat *status);
EXPORT int __lxstat(int version, const char *path, struct stat *status) { return (void)version, lstat(path, status); }
int __lxstat64(int version, const char *path, struct stat *status) EXPORT_ALIAS("__lxstat");

EXPORT DIR *opendir(const char *path)
{
	ready();
	return config.active && files_make_all(path) != 0 ? NULL : real.opendir(path);
}
