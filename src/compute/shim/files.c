/*
 * Files that are made on first use. To make a thousand sparse files before each start can cost more than the start itself, and a session
 * uses few of them; so with flag 1 of the page map a relation file is made, at its full length, when its name is first used: opened, looked
 * at, renamed, or listed with its folder.
 *
 * Whoever uses the name comes past files_make, and waits there while another process makes the file; so nobody ever sees it half made. Only
 * the postmaster itself lists folders as they are: at each start it looks through all of them for temporary files that a crash left, which no
 * mapped file is.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "shim.h"

static const char *const fork_suffixes[] = {"", "_fsm", "_vm", "_init"};

/* 0, or -1 and errno. */
static int make(const struct map_entry *entry, const char *path)
{
	int fd = real.open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	if (fd < 0)
		return -1;
	struct stat status;
	off_t length = (off_t)entry->blocks * PAGE_SIZE_BYTES;
	int result = fstat(fd, &status) == 0 && status.st_size < length ? real.ftruncate(fd, length) : 0;
	int error = errno;
	real.close(fd);
	errno = error;
	return result;
}

int files_make(const struct map_entry *entry, const char *path)
{
	if ((map->flags & MAP_FILES_ON_FIRST_USE) == 0)
		return 0;
	_Atomic uint32_t *name = map_name(entry);
	int saved = errno;
	for (;;) {
		uint32_t seen = atomic_load(name);
		if (seen == NAME_GONE || seen == NAME_MADE)
			break;
		if (seen == NAME_BEING_MADE) {
			struct timespec timeout = {.tv_nsec = 50 * 1000000L};
			syscall(SYS_futex, name, FUTEX_WAIT, NAME_BEING_MADE, &timeout, NULL, 0);
			continue;
		}
		sigset_t signals;
		block_signals(&signals);
		int result = 0;
		if (atomic_compare_exchange_strong(name, &seen, NAME_BEING_MADE)) {
			result = make(entry, path);
			int error = errno;
			atomic_store(name, result == 0 ? NAME_MADE : NAME_AT_START);
			syscall(SYS_futex, name, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
			errno = error;
		}
		restore_signals(&signals);
		if (result != 0)
			return -1;
	}
	errno = saved;
	return 0;
}

int files_make_all(const char *folder)
{
	uint32_t spc, db;
	if ((map->flags & MAP_FILES_ON_FIRST_USE) == 0 || getpid() == config.postmaster || !map_find_folder(folder, &spc, &db))
		return 0;
	const struct map_entry *entry;
	for (uint32_t number = 0; (entry = map_entry_at(number)) != NULL; number++) {
		uint32_t name = atomic_load(map_name(entry));
		if (entry->spc != spc || entry->db != db || name == NAME_MADE || name == NAME_GONE)
			continue; /* one that is being made is waited for */
		char path[PATH_MAX], segment[16] = "";
		if (entry->segment > 0)
			snprintf(segment, sizeof segment, ".%u", entry->segment);
		int length = snprintf(path, sizeof path, "%s/%u%s%s", folder, entry->rel, fork_suffixes[entry->fork & 3], segment);
		if (length < 0 || (size_t)length >= sizeof path) {
			errno = ENAMETOOLONG;
			return -1;
		}
		if (files_make(entry, path) != 0 && errno != ENOENT) /* ENOENT: the folder itself is gone */
			return -1;
	}
	return 0;
}

bool files_forgo(const struct map_entry *entry)
{
	uint32_t seen = NAME_AT_START;
	if ((map->flags & MAP_FILES_ON_FIRST_USE) == 0)
		return false;
	while (atomic_load(map_name(entry)) == NAME_BEING_MADE)
		syscall(SYS_futex, map_name(entry), FUTEX_WAIT, NAME_BEING_MADE, &(struct timespec){.tv_nsec = 50 * 1000000L}, NULL, 0);
	return atomic_compare_exchange_strong(map_name(entry), &seen, NAME_GONE);
}
