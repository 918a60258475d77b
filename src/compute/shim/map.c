/*
 * The configuration, taken from the environment once at load (Postgres overwrites its environment with process titles), and the page map.
 *
 *   STRATA_PAGE_MAP          path of the page map; without it the shim does nothing
 *   STRATA_DATA_DIR          the data directory, absolute
 *   STRATA_PAGESERVER        host:port
 *   STRATA_TOKEN_FILE        file with the token, read anew at each connection
 *   STRATA_TIMELINE          32 hex digits; must be the page map's
 *   STRATA_FETCH_TIMEOUT_MS  how long a call waits for a page before it fails with EIO (60000)
 *   STRATA_PARENT_DEATH      1 or the parent's pid: the first process gets SIGQUIT when its parent dies
 *   STRATA_PROCESSORS        a list such as 0-1,4: the server runs on these, to whichever its parent is kept
 *
 * In the Postgres server these variables, and the shim in LD_PRELOAD, are removed from the environment once taken, so that programs that it
 * starts (archive_command, COPY TO PROGRAM) run without the shim and never see the token's place. Any other program (a shell or a wrapper that is
 * about to run the server) keeps them.
 *
 * A server whose map cannot be used must not run at all: without the shim its tables would read as zeroes.
 */
#define _GNU_SOURCE
#include <ctype.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <unistd.h>

#include "shim.h"

/* Of the page map's room on disk, taken at load; one byte per 8 KiB of relations. */
#define MAX_RESERVED_BYTES (256 << 20)

struct shim_config config;
const struct map_header *map;
static uint8_t *map_bytes;
static const struct map_entry *map_entries;
static const uint32_t *map_index;

void shim_log(const char *format, ...)
{
	char line[1024];
	int saved = errno;
	va_list args;
	va_start(args, format);
	int prefix = snprintf(line, sizeof line, "strata page shim [%d]: ", (int)getpid());
	int length = vsnprintf(line + prefix, sizeof line - prefix - 1, format, args);
	va_end(args);
	if (length < 0)
		length = 0;
	size_t total = (size_t)prefix + (size_t)length;
	if (total > sizeof line - 2)
		total = sizeof line - 2;
	line[total] = '\n';
	ssize_t written = real.write(2, line, total + 1);
	(void)written;
	errno = saved;
}

_Atomic uint8_t *map_states(const struct map_entry *entry)
{
	return (_Atomic uint8_t *)(map_bytes + entry->states_offset);
}

_Atomic uint32_t *map_name(const struct map_entry *entry)
{
	return (_Atomic uint32_t *)(map_bytes + map->names_offset) + (entry - map_entries);
}

/* --- finding --- */

/* The same in page-map.ts. */
static uint32_t hash_key(uint32_t spc, uint32_t db, uint32_t rel, uint32_t fork, uint32_t segment)
{
	uint32_t fields[5] = {spc, db, rel, fork, segment};
	uint32_t hash = 0;
	for (int i = 0; i < 5; i++) {
		hash = (hash ^ fields[i]) * 0x9e3779b1u;
		hash ^= hash >> 15;
	}
	return hash;
}

static const struct map_entry *find(uint32_t spc, uint32_t db, uint32_t rel, uint32_t fork, uint32_t segment)
{
	uint32_t mask = map->slot_count - 1;
	for (uint32_t slot = hash_key(spc, db, rel, fork, segment) & mask;; slot = (slot + 1) & mask) {
		if (map_index[slot] == 0)
			return NULL;
		const struct map_entry *entry = &map_entries[map_index[slot] - 1];
		if (entry->rel == rel && entry->db == db && entry->spc == spc && entry->fork == fork && entry->segment == segment)
			return entry;
	}
}

/* A decimal number without leading zeroes; moves *text past it. */
static bool take_number(const char **text, uint32_t *number)
{
	const char *at = *text;
	uint64_t value = 0;
	if (*at < '1' || *at > '9')
		return false;
	for (; *at >= '0' && *at <= '9'; at++) {
		value = value * 10 + (uint64_t)(*at - '0');
		if (value > UINT32_MAX)
			return false;
	}
	*text = at;
	*number = (uint32_t)value;
	return true;
}

static bool take(const char **text, const char *prefix)
{
	size_t length = strlen(prefix);
	if (strncmp(*text, prefix, length) != 0)
		return false;
	*text += length;
	return true;
}

/* Copies the path with `//` and `/./` made single; false when it does not fit or holds `..`. */
static bool tidy(const char *path, char *to)
{
	char *at = to, *limit = to + PATH_MAX - 1;
	const char *from = path;
	while (*from != '\0') {
		bool starts_component = from == path || from[-1] == '/';
		if (starts_component && from[0] == '/' && from != path) {
			from++;
			continue;
		}
		if (starts_component && from[0] == '.' && (from[1] == '/' || from[1] == '\0')) {
			from += from[1] == '/' ? 2 : 1;
			continue;
		}
		if (starts_component && from[0] == '.' && from[1] == '.' && (from[2] == '/' || from[2] == '\0'))
			return false;
		if (at == limit)
			return false;
		*at++ = *from++;
	}
	*at = '\0';
	return true;
}

static bool cut_data_dir(const char **path, const char *directory)
{
	size_t length = strlen(directory);
	if (length == 0 || strncmp(*path, directory, length) != 0 || (*path)[length] != '/')
		return false;
	*path += length + 1;
	return true;
}

/* The folder of a database that the path begins with: what follows it in the buffer, or NULL. */
static const char *take_folder(const char *path, char *buffer, bool *relative, uint32_t *spc, uint32_t *db)
{
	const char *at = buffer;
	if (!tidy(path, buffer) && realpath(path, buffer) == NULL)
		return NULL;
	*relative = buffer[0] != '/';
	if (!*relative && !cut_data_dir(&at, config.data_dir) && !cut_data_dir(&at, config.data_dir_real))
		return NULL;
	*spc = 1663;
	*db = 0;
	if (take(&at, "global")) {
		*spc = 1664;
		return at;
	}
	if (take(&at, "base/"))
		return take_number(&at, db) ? at : NULL;
	if (!take(&at, "pg_tblspc/") || !take_number(&at, spc) || !take(&at, "/PG_"))
		return NULL;
	at = strchr(at, '/');
	if (at == NULL)
		return NULL;
	at++;
	return take_number(&at, db) ? at : NULL;
}

static bool is_in_data_dir(void)
{
	struct stat here;
	return stat(".", &here) == 0 && here.st_ino == config.data_dir_ino && here.st_dev == config.data_dir_dev;
}

const struct map_entry *map_find_path(const char *path)
{
	if (path == NULL)
		return NULL;
	size_t length = strnlen(path, PATH_MAX);
	if (length < 5 || length >= PATH_MAX)
		return NULL;
	char last = path[length - 1]; /* of a number, _fsm, _vm or _init: most other files are refused here */
	if (!(last >= '0' && last <= '9') && last != 'm' && last != 't')
		return NULL;

	char buffer[PATH_MAX];
	bool relative;
	uint32_t spc, db, rel, fork = 0, segment = 0;
	const char *at = take_folder(path, buffer, &relative, &spc, &db);
	if (at == NULL || *at++ != '/')
		return NULL;
	if (!take_number(&at, &rel))
		return NULL;
	if (take(&at, "_fsm"))
		fork = 1;
	else if (take(&at, "_vm"))
		fork = 2;
	else if (take(&at, "_init"))
		fork = 3;
	if (*at == '.') {
		at++;
		if (!take_number(&at, &segment))
			return NULL;
	}
	if (*at != '\0')
		return NULL;
	const struct map_entry *entry = find(spc, db, rel, fork, segment);
	return entry != NULL && relative && !is_in_data_dir() ? NULL : entry;
}

bool map_find_folder(const char *path, uint32_t *spc, uint32_t *db)
{
	char buffer[PATH_MAX];
	bool relative;
	if (path == NULL || strnlen(path, PATH_MAX) >= PATH_MAX)
		return false;
	const char *end = take_folder(path, buffer, &relative, spc, db);
	if (end == NULL || (end[0] != '\0' && (end[0] != '/' || end[1] != '\0')))
		return false;
	return !relative || is_in_data_dir();
}

const struct map_entry *map_entry_at(uint32_t number) { return number < map->entry_count ? &map_entries[number] : NULL; }

/* --- loading --- */

static uint32_t crc32_of(uint32_t crc, const uint8_t *bytes, size_t length)
{
	static uint32_t table[256];
	if (table[1] == 0)
		for (uint32_t i = 0; i < 256; i++) {
			uint32_t value = i;
			for (int bit = 0; bit < 8; bit++)
				value = (value >> 1) ^ (value & 1 ? 0xedb88320u : 0);
			table[i] = value;
		}
	crc = ~crc;
	for (size_t i = 0; i < length; i++)
		crc = table[(crc ^ bytes[i]) & 0xff] ^ (crc >> 8);
	return ~crc;
}

/* NULL, or what is wrong with the file. */
static const char *check_map(uint64_t length)
{
	const struct map_header *header = (const struct map_header *)map_bytes;
	if (length < sizeof *header || memcmp(header->magic, MAP_MAGIC, 8) != 0)
		return "it is not a page map";
	if (header->version != MAP_VERSION || (header->flags & ~(uint32_t)MAP_FILES_ON_FIRST_USE) != 0)
		return "it is of an unknown version";
	if (header->length != length)
		return "its length is not what its header says";
	if (header->block_size != PAGE_SIZE_BYTES || header->blocks_per_segment == 0)
		return "its block or segment size is not supported";
	uint64_t slots = header->slot_count;
	uint64_t index_offset = sizeof *header + (uint64_t)header->entry_count * sizeof(struct map_entry);
	uint64_t table_end = index_offset + slots * 4;
	if (slots == 0 || (slots & (slots - 1)) != 0 || slots <= header->entry_count)
		return "its index has an impossible size";
	if (table_end > header->names_offset || header->names_offset % 64 != 0 || header->states_offset % 64 != 0 ||
	    header->names_offset > length || header->states_offset > length ||
	    header->names_offset + (uint64_t)header->entry_count * 4 > header->states_offset)
		return "its parts overlap";
	static const uint8_t no_crc[4];
	uint32_t crc = crc32_of(0, map_bytes, offsetof(struct map_header, crc));
	crc = crc32_of(crc, no_crc, sizeof no_crc);
	crc = crc32_of(crc, map_bytes + 16, table_end - 16);
	if (crc != header->crc)
		return "its checksum is wrong";
	const struct map_entry *entries = (const struct map_entry *)(map_bytes + sizeof *header);
	const uint32_t *index = (const uint32_t *)(map_bytes + index_offset);
	for (uint32_t i = 0; i < header->entry_count; i++)
		if (entries[i].states_offset % 64 != 0 || entries[i].states_offset < header->states_offset ||
		    entries[i].states_offset > length || entries[i].blocks > length - entries[i].states_offset ||
		    entries[i].blocks > header->blocks_per_segment ||
		    (uint64_t)entries[i].segment * header->blocks_per_segment + entries[i].blocks > UINT32_MAX)
			return "one of its entries is out of bounds";
	for (uint64_t i = 0; i < slots; i++)
		if (index[i] > header->entry_count)
			return "its index is out of bounds";
	map = header;
	map_entries = entries;
	map_index = index;
	return NULL;
}

/* NULL, or what is wrong. */
static const char *load_map(const char *path)
{
	int fd = real.open(path, O_RDWR | O_CLOEXEC);
	if (fd < 0)
		return strerror(errno);
	struct stat status;
	if (fstat(fd, &status) != 0 || status.st_size <= 0) {
		real.close(fd);
		return "it is empty";
	}
	/* Room on the disk for every state byte: a full disk would otherwise kill whoever claims a page. */
	if (status.st_size <= MAX_RESERVED_BYTES && real.fallocate(fd, 0, 0, status.st_size) != 0 && errno == ENOSPC) {
		real.close(fd);
		return "there is no room left on its disk";
	}
	void *bytes = mmap(NULL, (size_t)status.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	real.close(fd);
	if (bytes == MAP_FAILED)
		return strerror(errno);
	map_bytes = bytes;
	const char *problem = check_map((uint64_t)status.st_size);
	if (problem != NULL) {
		munmap(bytes, (size_t)status.st_size);
		map_bytes = NULL;
	}
	return problem;
}

static const char *copy_variable(const char *name, char *to, size_t size)
{
	const char *value = getenv(name);
	if (value == NULL || *value == '\0' || strlen(value) >= size)
		return name;
	strcpy(to, value);
	return NULL;
}

static bool is_our_timeline(void)
{
	for (int i = 0; i < 16; i++) {
		char digits[3];
		snprintf(digits, sizeof digits, "%02x", map->timeline[i]);
		if (memcmp(digits, config.timeline + 2 * i, 2) != 0)
			return false;
	}
	return true;
}

/* NULL, or what is wrong. */
static const char *load_config(const char *map_path)
{
	char address[300];
	const char *missing = copy_variable("STRATA_DATA_DIR", config.data_dir, sizeof config.data_dir);
	if (missing == NULL)
		missing = copy_variable("STRATA_TOKEN_FILE", config.token_file, sizeof config.token_file);
	if (missing == NULL)
		missing = copy_variable("STRATA_TIMELINE", config.timeline, sizeof config.timeline);
	if (missing == NULL)
		missing = copy_variable("STRATA_PAGESERVER", address, sizeof address);
	if (missing != NULL) {
		static char message[100];
		snprintf(message, sizeof message, "%s is missing or too long", missing);
		return message;
	}
	size_t length = strlen(config.data_dir);
	while (length > 1 && config.data_dir[length - 1] == '/')
		config.data_dir[--length] = '\0';
	char *colon = strrchr(address, ':');
	if (colon == NULL || colon == address || (size_t)(colon - address) >= sizeof config.host || strlen(colon + 1) >= sizeof config.port)
		return "STRATA_PAGESERVER is not host:port";
	bool bracketed = address[0] == '[' && colon[-1] == ']'; /* [::1]:6400 */
	memcpy(config.host, address + bracketed, (size_t)(colon - address) - 2 * bracketed);
	strcpy(config.port, colon + 1);
	struct stat status;
	if (config.data_dir[0] != '/' || stat(config.data_dir, &status) != 0 || realpath(config.data_dir, config.data_dir_real) == NULL)
		return "STRATA_DATA_DIR is not an absolute path of a folder";
	config.data_dir_dev = status.st_dev;
	config.data_dir_ino = status.st_ino;
	const char *timeout = getenv("STRATA_FETCH_TIMEOUT_MS");
	config.fetch_timeout_ms = timeout == NULL ? 60000 : atoll(timeout);
	if (config.fetch_timeout_ms <= 0)
		return "STRATA_FETCH_TIMEOUT_MS is not a number of milliseconds";
	if (strlen(config.timeline) != TIMELINE_HEX_LENGTH)
		return "STRATA_TIMELINE is not 32 hex digits";
	const char *problem = load_map(map_path);
	if (problem == NULL && !is_our_timeline())
		return "the page map is another timeline's";
	return problem;
}

static bool is_postgres(void)
{
	char path[PATH_MAX];
	ssize_t length = readlink("/proc/self/exe", path, sizeof path - 1);
	if (length < 0)
		return false;
	path[length] = '\0';
	const char *name = strrchr(path, '/');
	name = name == NULL ? path : name + 1;
	return strncmp(name, "postgres", 8) == 0 || strncmp(name, "postmaster", 10) == 0;
}

/* Takes the shim out of LD_PRELOAD and leaves what else is there. */
static void leave_preload(void)
{
	const char *preload = getenv("LD_PRELOAD");
	Dl_info self;
	if (preload == NULL || dladdr((void *)&leave_preload, &self) == 0 || self.dli_fname == NULL || strlen(preload) >= PATH_MAX)
		return;
	char rest[PATH_MAX] = "";
	for (const char *at = preload; *at != '\0';) {
		size_t length = strcspn(at, ": ");
		if (length > 0 && !(strlen(self.dli_fname) == length && strncmp(at, self.dli_fname, length) == 0)) {
			if (rest[0] != '\0')
				strcat(rest, ":");
			strncat(rest, at, length);
		}
		at += length;
		if (*at != '\0')
			at++;
	}
	if (rest[0] == '\0')
		unsetenv("LD_PRELOAD");
	else
		setenv("LD_PRELOAD", rest, 1);
}

static void die_with_parent(void)
{
	const char *value = getenv("STRATA_PARENT_DEATH");
	long parent = value == NULL ? 0 : atol(value);
	if (parent <= 0)
		return;
	prctl(PR_SET_PDEATHSIG, SIGQUIT);
	if (parent > 1 && getppid() != (pid_t)parent) { /* it died before we asked */
		shim_log("the parent process %ld is gone", parent);
		_exit(1);
	}
}

/* Those that there are, if any, are used; it is no matter of right or wrong. */
static void take_processors(void)
{
	const char *at = getenv("STRATA_PROCESSORS");
	cpu_set_t processors;
	CPU_ZERO(&processors);
	while (at != NULL && isdigit((unsigned char)*at)) {
		char *end;
		long first = strtol(at, &end, 10), last = *end == '-' ? strtol(end + 1, &end, 10) : first;
		for (; first <= last && first < CPU_SETSIZE; first++)
			CPU_SET(first, &processors);
		at = *end == ',' ? end + 1 : NULL;
	}
	if (CPU_COUNT(&processors) > 0)
		sched_setaffinity(0, sizeof processors, &processors);
}

__attribute__((constructor)) static void load(void)
{
	resolve_real_calls();
	const char *map_path = getenv("STRATA_PAGE_MAP");
	if (map_path == NULL || *map_path == '\0')
		return;
	bool server = is_postgres();
	const char *problem = load_config(map_path);
	if (problem != NULL) {
		if (!server)
			return;
		shim_log("cannot use the page map %s: %s", map_path, problem);
		_exit(1);
	}
	config.active = true;
	if (!server)
		return;
	config.postmaster = getpid();
	die_with_parent();
	take_processors();
	leave_preload();
	static const char *const names[] = {"STRATA_PAGE_MAP", "STRATA_DATA_DIR", "STRATA_PAGESERVER", "STRATA_TOKEN_FILE",
	                                    "STRATA_TIMELINE", "STRATA_FETCH_TIMEOUT_MS", "STRATA_PARENT_DEATH", "STRATA_PROCESSORS"};
	for (size_t i = 0; i < sizeof names / sizeof *names; i++)
		unsetenv(names[i]);
}
