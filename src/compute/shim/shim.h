/*
 * What the parts of the shim know of each other.
 *
 *   wrap.c     the libc calls on descriptors that Postgres makes, each deciding whether it is about a mapped relation file
 *   names.c    the libc calls on names, likewise
 *   pages.c    the states of pages: claims, waiting, making pages present, keeping writers and fetches apart
 *   wire.c     the connection to the pageserver, one per process
 *   files.c    files that are made on first use
 *   map.c      the configuration and the page map: load, check, find
 *   walsender.c  the calls of a walsender on its socket; nothing to do with pages
 *
 * Rules that all keep:
 *   - A page's state leaves `absent` only by a compare-and-swap to `claimed`; the claimer alone writes that page to the local file, and
 *     moves the state on only after the write returned.
 *   - Who holds claims to fetch never waits for anybody else's claim. Who holds claims to write or cut may wait for claims at higher
 *     blocks only, within one entry. So there is no cycle of waits.
 *   - While claims are held or the connection is in use, signals are blocked (except those of a crash or an immediate
 *     shutdown), so a handler that leaves by a jump cannot strand a claim. While sleeping they are not.
 *   - Nothing here allocates memory; Postgres is single-threaded and so is the shim's state.
 */
#ifndef STRATA_SHIM_H
#define STRATA_SHIM_H

#include <dirent.h>
#include <limits.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <sys/epoll.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>

#include "format.h"

/* Descriptors above this are refused for mapped files (EMFILE); Postgres' own limit is max_files_per_process, 1000. */
#define MAX_TRACKED_FD 65536

struct shim_config {
	bool active;
	int64_t fetch_timeout_ms;
	char host[256];
	char port[16];
	char token_file[PATH_MAX];
	char timeline[TIMELINE_HEX_LENGTH + 1];
	char data_dir[PATH_MAX];
	char data_dir_real[PATH_MAX];
	dev_t data_dir_dev;
	ino_t data_dir_ino;
	pid_t postmaster; /* the server's first process, or 0 */
};

extern struct shim_config config;

/* The libc functions behind the wrapped names; resolved on first use. */
struct real_calls {
	int (*open)(const char *, int, ...);
	int (*openat)(int, const char *, int, ...);
	int (*close)(int);
	int (*dup)(int);
	int (*dup2)(int, int);
	int (*dup3)(int, int, int);
	int (*fcntl)(int, int, ...);
	ssize_t (*read)(int, void *, size_t);
	ssize_t (*readv)(int, const struct iovec *, int);
	ssize_t (*pread)(int, void *, size_t, off_t);
	ssize_t (*preadv)(int, const struct iovec *, int, off_t);
	ssize_t (*write)(int, const void *, size_t);
	ssize_t (*writev)(int, const struct iovec *, int);
	ssize_t (*pwrite)(int, const void *, size_t, off_t);
	ssize_t (*pwritev)(int, const struct iovec *, int, off_t);
	int (*ftruncate)(int, off_t);
	int (*truncate)(const char *, off_t);
	int (*posix_fallocate)(int, off_t, off_t);
	int (*fallocate)(int, int, off_t, off_t);
	int (*posix_fadvise)(int, off_t, off_t, int);
	ssize_t (*copy_file_range)(int, off_t *, int, off_t *, size_t, unsigned);
	ssize_t (*sendfile)(int, int, off_t *, size_t);
	int (*unlink)(const char *);
	int (*unlinkat)(int, const char *, int);
	int (*rename)(const char *, const char *);
	FILE *(*fopen)(const char *, const char *);
	DIR *(*opendir)(const char *);
	int (*access)(const char *, int);
	ssize_t (*send)(int, const void *, size_t, int);
	ssize_t (*recv)(int, void *, size_t, int);
	int (*epoll_wait)(int, struct epoll_event *, int, int);
	int (*stat)(const char *, struct stat *);
	int (*lstat)(const char *, struct stat *);
	int (*xstat)(int, const char *, struct stat *);
	int (*lxstat)(int, const char *, struct stat *);
};

extern struct real_calls real;
void resolve_real_calls(void);

#define EXPORT __attribute__((visibility("default")))
#define EXPORT_ALIAS(name) __attribute__((visibility("default"), alias(name)))

/* Other libraries' constructors may call before ours ran. */
static inline void ready(void)
{
	if (__builtin_expect(real.close == NULL, 0))
		resolve_real_calls();
}

/* --- map.c --- */

extern const struct map_header *map;

/* The entry that a path names, or NULL. Paths that are not the data directory's are NULL. */
const struct map_entry *map_find_path(const char *path);
_Atomic uint8_t *map_states(const struct map_entry *entry);
_Atomic uint32_t *map_name(const struct map_entry *entry);
static inline bool map_is_gone(const struct map_entry *entry) { return atomic_load(map_name(entry)) == NAME_GONE; }

/* True when the path is the folder of a database, and which. */
bool map_find_folder(const char *path, uint32_t *spc, uint32_t *db);
/* NULL past the last. */
const struct map_entry *map_entry_at(uint32_t number);

/* What may happen again and again is logged by a process at most this often. */
#define LOG_INTERVAL_MS 10000

/* One line to standard error, which is the server's log. */
void shim_log(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* --- files.c --- */

/* The entry's file is about to be used under `path`: makes it when it is one that is made on first use. -1 and errno when that fails. */
int files_make(const struct map_entry *entry, const char *path);
/* The folder is about to be listed: makes all of its files. */
int files_make_all(const char *folder);
/* The name is to go: true when its file was never made, and now never will be. */
bool files_forgo(const struct map_entry *entry);

/* --- pages.c --- */

/* All but those of a crash or an immediate shutdown. */
void block_signals(sigset_t *before);
void restore_signals(const sigset_t *before);

/* What is remembered of a descriptor of a mapped file. */
struct open_file {
	const struct map_entry *entry; /* NULL: not one */
	int flags;                     /* of open */
	uint32_t read_end;             /* the block after the last read */
	uint32_t miss_end;             /* the block after the last fetch that a read caused */
	uint32_t run;                  /* pages of that fetch */
};

extern struct open_file open_files[MAX_TRACKED_FD];

static inline struct open_file *tracked(int fd)
{
	if ((unsigned)fd >= MAX_TRACKED_FD || open_files[fd].entry == NULL)
		return NULL;
	return &open_files[fd];
}

/* Makes blocks [first, end) of the file present. -1 and errno (EIO, or what the local write failed with) when it cannot. */
int pages_ensure(int fd, uint32_t first, uint32_t end);

/* Asks for those of blocks [first, end) that are absent, without waiting and without claims. */
void pages_prefetch(int fd, uint32_t first, uint32_t end);

/* The descriptor is about to be closed: answers still under way may not be written through it. */
void pages_forget_fd(int fd);

/*
 * Claims every absent block of [first, end), waiting for claims of others; after it every block of the range is present or ours.
 * -1 with EIO when another's claim did not end in time (then nothing is claimed). Signals stay blocked until pages_release, which makes
 * the claimed blocks below `present_end` present and returns the rest to absent.
 */
struct claim {
	const struct map_entry *entry;
	uint32_t first, end;
	sigset_t signals;
};
int pages_claim(struct claim *claim, const struct map_entry *entry, uint32_t first, uint32_t end);
void pages_release(struct claim *claim, uint32_t present_end);

bool pages_all_present(const struct map_entry *entry, uint32_t first, uint32_t end);

/* --- wire.c --- */

enum wire_result { WIRE_OK, WIRE_LOST, WIRE_REFUSED };

/* Connects if this process has no connection. WIRE_LOST: not reachable; WIRE_REFUSED: reached, and it does not want us. */
enum wire_result wire_connect(int64_t deadline_ms);
enum wire_result wire_send(const void *bytes, size_t length, int64_t deadline_ms);
enum wire_result wire_receive(void *bytes, size_t length, int64_t deadline_ms);
void wire_drop(void);
/* The socket of this process, or -1. */
int wire_fd(void);
/* Grows by one with each connection that is dropped, and after a fork: what was asked before is not coming. */
uint64_t wire_generation(void);
int64_t now_ms(void);

#endif
