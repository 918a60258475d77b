/*
 * The states of pages: who may touch an absent page, and how it becomes present.
 *
 *   read      absent pages of the range are claimed as one run (with pages after it when reads are sequential), asked for, written to
 *             the local file and made present; then pages that others have claimed are waited for.
 *   write     absent pages are claimed and held over the write; pages claimed by others are waited for first.
 *   prefetch  pages are asked for without a claim, for a claim held by an idle process would stop everybody. When the answer is taken
 *             from the socket (by the next fetch of this process, or by a read of one of its pages), the pages still absent are claimed,
 *             stored and made present; the others are thrown away. The answer cannot be outdated: an absent page never changed.
 *
 * A call fails with EIO when no page came for config.fetch_timeout_ms, or the pageserver answered with errors for REFUSED_PATIENCE_MS.
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

#define REFUSED_PATIENCE_MS 3000
#define MAX_BACKOFF_MS 500
#define FUTEX_TIMEOUT_MS 100
#define MAX_ASKED 64
#define MAX_SKIP 4096
#define SMALL_STEP 32
#define SMALL_FILE 16
#define MAX_ASKED_PAGES (2 * MAX_RUN)

struct open_file open_files[MAX_TRACKED_FD];

/* Requests under way on this process' connection, oldest first: a ring. */
struct asked {
	uint32_t id;
	const struct map_entry *entry;
	int fd; /* -1: closed since, the answer is thrown away */
	uint32_t block, count;
	bool claimed;
};

static struct asked ring[MAX_ASKED];
static unsigned ring_start, ring_length;
static uint64_t ring_generation;
static uint32_t last_request_id;
static int64_t no_prefetch_before_ms;
static char refusal[256];

/* Aligned for descriptors opened with O_DIRECT. */
static uint8_t buffer[MAX_RUN * PAGE_SIZE_BYTES] __attribute__((aligned(4096)));

/* --- signals --- */

void block_signals(sigset_t *before)
{
	static const int deadly[] = {SIGQUIT, SIGABRT, SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGSYS};
	sigset_t all;
	sigfillset(&all);
	for (size_t i = 0; i < sizeof deadly / sizeof *deadly; i++)
		sigdelset(&all, deadly[i]);
	sigprocmask(SIG_BLOCK, &all, before);
}

void restore_signals(const sigset_t *before) { sigprocmask(SIG_SETMASK, before, NULL); }

/* --- states --- */

static _Atomic uint32_t *word_of(_Atomic uint8_t *state) { return (_Atomic uint32_t *)((uintptr_t)state & ~(uintptr_t)3); }

/* By the claimer only. */
static void set_state(_Atomic uint8_t *state, uint8_t to)
{
	if (atomic_exchange(state, to) == PAGE_CLAIMED_AWAITED)
		syscall(SYS_futex, word_of(state), FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

static void set_states(const struct map_entry *entry, uint32_t first, uint32_t end, uint8_t to)
{
	_Atomic uint8_t *states = map_states(entry);
	for (uint32_t block = first; block < end; block++)
		set_state(&states[block], to);
}

static bool claim_one(_Atomic uint8_t *state)
{
	uint8_t expected = PAGE_ABSENT;
	return atomic_compare_exchange_strong(state, &expected, PAGE_CLAIMED);
}

/* Claims blocks from `first` on while they are absent; how many. */
static uint32_t claim_run(const struct map_entry *entry, uint32_t first, uint32_t limit)
{
	_Atomic uint8_t *states = map_states(entry);
	uint32_t count = 0;
	while (count < limit && claim_one(&states[first + count]))
		count++;
	return count;
}

/* Waits while the page is claimed; false at the deadline. */
static bool wait_for_claim(_Atomic uint8_t *state, int64_t deadline_ms)
{
	_Atomic uint32_t *word = word_of(state);
	unsigned shift = 8 * ((uintptr_t)state & 3);
	for (;;) {
		uint8_t seen = PAGE_CLAIMED;
		if (!atomic_compare_exchange_strong(state, &seen, PAGE_CLAIMED_AWAITED) && seen != PAGE_CLAIMED_AWAITED)
			return true;
		uint32_t value = atomic_load(word);
		if (((value >> shift) & 0xff) != PAGE_CLAIMED_AWAITED)
			continue;
		if (now_ms() >= deadline_ms)
			return false;
		struct timespec timeout = {.tv_nsec = FUTEX_TIMEOUT_MS * 1000000L};
		syscall(SYS_futex, word, FUTEX_WAIT, value, &timeout, NULL, 0);
	}
}

bool pages_all_present(const struct map_entry *entry, uint32_t first, uint32_t end)
{
	_Atomic uint8_t *states = map_states(entry);
	if (end > entry->blocks)
		end = entry->blocks;
	for (uint32_t block = first; block < end; block++)
		if (atomic_load_explicit(&states[block], memory_order_acquire) != PAGE_PRESENT)
			return false;
	return true;
}

/* --- storing pages in the local file --- */

/* The descriptor itself, or another of the same file that pages can be written through at an offset; that one is to be closed. */
static int writable_fd(int fd)
{
	int flags = open_files[fd].flags;
	if ((flags & O_ACCMODE) != O_RDONLY && (flags & O_APPEND) == 0)
		return fd;
	char path[40];
	snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
	return real.open(path, O_RDWR | O_CLOEXEC);
}

/* 0, or -1 and errno. */
static int store(int fd, uint32_t first, uint32_t count, const uint8_t *pages)
{
	int target = writable_fd(fd);
	if (target < 0)
		return -1;
	off_t offset = (off_t)first * PAGE_SIZE_BYTES;
	size_t left = (size_t)count * PAGE_SIZE_BYTES;
	while (left > 0) {
		ssize_t written = real.pwrite(target, pages, left, offset);
		if (written <= 0 && !(written < 0 && errno == EINTR)) {
			int error = written == 0 ? ENOSPC : errno;
			if (target != fd)
				real.close(target);
			errno = error;
			return -1;
		}
		if (written > 0) {
			pages += written;
			offset += written;
			left -= (size_t)written;
		}
	}
	if (target != fd)
		real.close(target);
	return 0;
}

/* Stores those of the pages that are still absent. */
static void store_unclaimed(const struct asked *asked)
{
	if (asked->fd < 0 || open_files[asked->fd].entry != asked->entry)
		return;
	_Atomic uint8_t *states = map_states(asked->entry);
	uint32_t end = asked->block + asked->count;
	for (uint32_t block = asked->block; block < end;) {
		uint32_t count = claim_run(asked->entry, block, end - block);
		if (count == 0) {
			block++;
			continue;
		}
		const uint8_t *pages = buffer + (size_t)(block - asked->block) * PAGE_SIZE_BYTES;
		uint8_t to = store(asked->fd, block, count, pages) == 0 ? PAGE_PRESENT : PAGE_ABSENT;
		for (uint32_t i = 0; i < count; i++)
			set_state(&states[block + i], to);
		block += count;
	}
}

/* --- asking and receiving; signals are blocked --- */

static void sync_ring(void)
{
	uint64_t generation = wire_generation();
	if (ring_generation != generation) {
		ring_generation = generation;
		ring_start = ring_length = 0;
	}
}

static struct asked *ring_at(unsigned index) { return &ring[(ring_start + index) % MAX_ASKED]; }

/* The request under way that covers the block, or NULL. */
static const struct asked *find_asked(const struct map_entry *entry, uint32_t block)
{
	sync_ring();
	for (unsigned i = 0; i < ring_length; i++) {
		const struct asked *asked = ring_at(i);
		if (asked->entry == entry && asked->fd >= 0 && block >= asked->block && block - asked->block < asked->count)
			return asked;
	}
	return NULL;
}

static uint32_t asked_pages(void)
{
	uint32_t pages = 0;
	for (unsigned i = 0; i < ring_length; i++)
		pages += ring_at(i)->count;
	return pages;
}

void pages_forget_fd(int fd)
{
	for (unsigned i = 0; i < ring_length; i++)
		if (ring_at(i)->fd == fd)
			ring_at(i)->fd = -1;
}

static enum wire_result ask(int fd, const struct map_entry *entry, uint32_t block, uint32_t count, bool claimed, int64_t deadline_ms)
{
	struct page_request request = {
		.op = OP_GET_PAGES,
		.request_id = ++last_request_id,
		.lsn = map->start_lsn,
		.spc = entry->spc,
		.db = entry->db,
		.rel = entry->source_rel,
		.fork = entry->source_fork,
		.block = entry->segment * map->blocks_per_segment + block,
		.count = count,
	};
	enum wire_result result = wire_send(&request, sizeof request, deadline_ms);
	if (result != WIRE_OK)
		return result;
	*ring_at(ring_length++) = (struct asked){request.request_id, entry, fd, block, count, claimed};
	return WIRE_OK;
}

/* No page of this timeline can be newer than the LSN that it was asked at. */
static bool is_plausible(const uint8_t *page)
{
	uint32_t high, low;
	memcpy(&high, page, 4);
	memcpy(&low, page + 4, 4);
	return (((uint64_t)high << 32) | low) <= map->start_lsn;
}

static enum wire_result receive_refusal(uint32_t length, int64_t deadline_ms)
{
	size_t shown = length < sizeof refusal - 1 ? length : sizeof refusal - 1;
	if (wire_receive(refusal, shown, deadline_ms) != WIRE_OK)
		return WIRE_LOST;
	refusal[shown] = '\0';
	if (wire_receive(buffer, length - shown, deadline_ms) != WIRE_OK)
		return WIRE_LOST;
	return WIRE_REFUSED;
}

/* Takes the oldest answer off the socket into the buffer and tells to which request it belongs. */
static enum wire_result receive(struct asked *asked, int64_t deadline_ms)
{
	*asked = *ring_at(0);
	struct page_response response;
	if (wire_receive(&response, sizeof response, deadline_ms) != WIRE_OK)
		return WIRE_LOST;
	bool pages = response.status == 0;
	if (response.request_id != asked->id || response.reserved != 0 ||
	    (pages ? response.length != asked->count * PAGE_SIZE_BYTES : response.length > MAX_MESSAGE_BYTES)) {
		static int64_t logged_ms;
		if (logged_ms == 0 || now_ms() - logged_ms > LOG_INTERVAL_MS) {
			logged_ms = now_ms();
			shim_log("the pageserver sent a malformed answer (request %u, status %u, length %u) to request %u for %u pages",
				 response.request_id, response.status, response.length, asked->id, asked->count);
		}
		wire_drop();
		return WIRE_LOST;
	}
	enum wire_result result = pages ? wire_receive(buffer, response.length, deadline_ms) : receive_refusal(response.length, deadline_ms);
	if (result == WIRE_LOST)
		return WIRE_LOST;
	ring_start = (ring_start + 1) % MAX_ASKED;
	ring_length--;
	for (uint32_t i = 0; result == WIRE_OK && i < asked->count; i++)
		if (!is_plausible(buffer + (size_t)i * PAGE_SIZE_BYTES)) {
			snprintf(refusal, sizeof refusal, "block %u came with an LSN after the one asked for", asked->block + i);
			result = WIRE_REFUSED;
		}
	return result;
}

/* Takes the oldest answer, which nobody holds claims for. */
static enum wire_result receive_prefetched(int64_t deadline_ms)
{
	struct asked asked;
	enum wire_result result = receive(&asked, deadline_ms);
	if (result == WIRE_OK)
		store_unclaimed(&asked);
	return result == WIRE_LOST ? WIRE_LOST : WIRE_OK;
}

/* Fetches blocks that we have claimed and makes them present; or returns the claims. *error is set when storing failed. */
static enum wire_result fetch_claimed(int fd, const struct map_entry *entry, uint32_t block, uint32_t count, int64_t deadline_ms, int *error)
{
	struct asked asked;
	enum wire_result result = WIRE_OK;
	while (result == WIRE_OK && ring_length == MAX_ASKED)
		result = receive_prefetched(deadline_ms);
	if (result == WIRE_OK)
		result = ask(fd, entry, block, count, true, deadline_ms);
	while (result == WIRE_OK) {
		result = receive(&asked, deadline_ms);
		if (asked.claimed)
			break;
		if (result == WIRE_OK)
			store_unclaimed(&asked);
		else if (result == WIRE_REFUSED)
			result = WIRE_OK; /* only a prefetch */
	}
	if (result == WIRE_OK && store(fd, block, count, buffer) != 0)
		*error = errno;
	set_states(entry, block, block + count, result == WIRE_OK && *error == 0 ? PAGE_PRESENT : PAGE_ABSENT);
	return result;
}

/* Absent blocks from `first` on, at most `limit`. */
static uint32_t absent_run(const struct map_entry *entry, uint32_t first, uint32_t limit)
{
	_Atomic uint8_t *states = map_states(entry);
	uint32_t count = 0;
	while (count < limit && first + count < entry->blocks && atomic_load(&states[first + count]) == PAGE_ABSENT)
		count++;
	return count;
}

/*
 * Asks for the blocks after the last fetch, so that they travel while the caller works on what it has. As many runs as may be under way: while one
 * travels, the pageserver makes the next.
 */
static void read_ahead(int fd, struct open_file *file, int64_t deadline_ms)
{
	uint32_t block = file->miss_end;
	sync_ring();
	while (wire_fd() >= 0 && ring_length < MAX_ASKED && asked_pages() + MAX_RUN <= MAX_ASKED_PAGES) {
		const struct asked *asked = find_asked(file->entry, block);
		if (asked != NULL) {
			block = asked->block + asked->count;
			continue;
		}
		uint32_t count = absent_run(file->entry, block, MAX_RUN);
		if (count == 0 || ask(fd, file->entry, block, count, false, deadline_ms) != WIRE_OK)
			return;
		block += count;
	}
}

/* --- reading --- */

static void pause_ms(int64_t duration_ms)
{
	struct timespec duration = {.tv_sec = duration_ms / 1000, .tv_nsec = duration_ms % 1000 * 1000000};
	nanosleep(&duration, NULL);
}

/* The first absent block of the range, else the first claimed one, else `end`. */
static uint32_t first_wanted(const struct map_entry *entry, uint32_t first, uint32_t end, bool *absent)
{
	_Atomic uint8_t *states = map_states(entry);
	uint32_t claimed = end;
	*absent = false;
	for (uint32_t block = first; block < end; block++) {
		uint8_t state = atomic_load_explicit(&states[block], memory_order_acquire);
		if (state == PAGE_ABSENT) {
			*absent = true;
			return block;
		}
		if (state != PAGE_PRESENT && claimed == end)
			claimed = block;
	}
	return claimed;
}

/*
 * How many pages from this miss on are worth fetching. A miss that goes on where the last fetch of this descriptor ended doubles its length;
 * so does one after blocks that are all here or coming (in shared buffers, or fetched by others). A small step forward keeps the
 * length: parallel workers share out one scan in small pieces. Anything else begins anew with what is needed.
 */
static uint32_t next_run(const struct open_file *file, uint32_t block, bool continues_read)
{
	bool doubles = continues_read;
	if (!doubles && block >= file->miss_end && block - file->miss_end <= MAX_SKIP) {
		_Atomic uint8_t *states = map_states(file->entry);
		uint32_t between = file->miss_end;
		while (between < block && atomic_load_explicit(&states[between], memory_order_relaxed) != PAGE_ABSENT)
			between++;
		if (between < block)
			return block - file->miss_end <= SMALL_STEP ? file->run : 1;
		doubles = true;
	}
	/* A small file, as most catalogs and their indexes are, comes at once: its other pages take less than another round trip. */
	uint32_t least = file->entry->blocks <= SMALL_FILE ? SMALL_FILE : 1;
	if (!doubles || file->run < least)
		return least;
	return file->run * 2 > MAX_RUN ? MAX_RUN : file->run * 2;
}

/* One attempt at the absent block `block` and those after it. */
static enum wire_result fetch_from(int fd, struct open_file *file, uint32_t block, uint32_t end, bool continues_read, int64_t deadline_ms, int *error)
{
	const struct map_entry *entry = file->entry;
	enum wire_result result = wire_connect(deadline_ms);
	if (result != WIRE_OK)
		return result;
	bool streaming = block == file->miss_end;
	const struct asked *asked = find_asked(entry, block);
	if (asked != NULL) {
		file->miss_end = asked->block + asked->count;
		while (result == WIRE_OK && find_asked(entry, block) != NULL)
			result = receive_prefetched(deadline_ms);
	} else {
		uint32_t limit = next_run(file, block, continues_read);
		if (limit < end - block)
			limit = end - block < MAX_RUN ? end - block : MAX_RUN;
		if (limit > entry->blocks - block)
			limit = entry->blocks - block;
		uint32_t count = claim_run(entry, block, limit);
		if (count == 0)
			return WIRE_OK;
		result = fetch_claimed(fd, entry, block, count, deadline_ms, error);
		file->miss_end = block + count;
		file->run = limit;
	}
	if (streaming && file->run == MAX_RUN && result == WIRE_OK && *error == 0)
		read_ahead(fd, file, deadline_ms);
	return result;
}

static int give_up(const struct map_entry *entry, uint32_t block, const char *reason)
{
	shim_log("cannot get block %u of relation %u/%u/%u fork %u at %X/%X: %s", entry->segment * map->blocks_per_segment + block, entry->spc,
		 entry->db, entry->rel, entry->fork, (unsigned)(map->start_lsn >> 32), (unsigned)map->start_lsn, reason);
	errno = EIO;
	return -1;
}

int pages_ensure(int fd, uint32_t first, uint32_t end)
{
	struct open_file *file = &open_files[fd];
	const struct map_entry *entry = file->entry;
	if (end > entry->blocks)
		end = entry->blocks;
	if (first >= end || pages_all_present(entry, first, end))
		return 0;
	int saved = errno;
	bool continues_read = first == file->read_end;
	int64_t deadline_ms = now_ms() + config.fetch_timeout_ms, refused_since_ms = 0, backoff_ms = 0;
	for (;;) {
		bool absent;
		uint32_t block = first_wanted(entry, first, end, &absent);
		if (block == end) {
			errno = saved;
			return 0;
		}
		if (!absent) {
			if (!wait_for_claim(&map_states(entry)[block], deadline_ms))
				return give_up(entry, block, "another process did not finish fetching or writing it");
			continue;
		}
		sigset_t signals;
		int error = 0;
		int64_t attempt_end_ms = now_ms() + config.fetch_timeout_ms / 3 + 1;
		block_signals(&signals);
		enum wire_result result =
			fetch_from(fd, file, block, end, continues_read, attempt_end_ms < deadline_ms ? attempt_end_ms : deadline_ms, &error);
		restore_signals(&signals);
		int64_t now = now_ms();
		if (error != 0) {
			errno = error;
			return -1;
		}
		if (result == WIRE_OK) {
			deadline_ms = now + config.fetch_timeout_ms;
			refused_since_ms = backoff_ms = 0;
			continue;
		}
		if (now >= deadline_ms)
			return give_up(entry, block, result == WIRE_LOST ? "the pageserver does not answer" : "the pageserver refused");
		if (result == WIRE_REFUSED && wire_fd() >= 0) {
			if (refused_since_ms == 0)
				refused_since_ms = now;
			if (now - refused_since_ms >= REFUSED_PATIENCE_MS)
				return give_up(entry, block, refusal);
		}
		if (backoff_ms > 0)
			pause_ms(backoff_ms < deadline_ms - now ? backoff_ms : deadline_ms - now);
		backoff_ms = backoff_ms == 0 ? 5 : backoff_ms * 2 > MAX_BACKOFF_MS ? MAX_BACKOFF_MS : backoff_ms * 2;
	}
}

void pages_prefetch(int fd, uint32_t first, uint32_t end)
{
	const struct map_entry *entry = open_files[fd].entry;
	if (end > entry->blocks)
		end = entry->blocks;
	if (first >= end || pages_all_present(entry, first, end) || now_ms() < no_prefetch_before_ms)
		return;
	int saved = errno;
	sigset_t signals;
	block_signals(&signals);
	int64_t deadline_ms = now_ms() + config.fetch_timeout_ms / 3 + 1;
	enum wire_result result = wire_connect(deadline_ms);
	for (uint32_t block = first; result == WIRE_OK && block < end;) {
		uint32_t left = end - block;
		uint32_t count = absent_run(entry, block, left < MAX_RUN ? left : MAX_RUN);
		if (count == 0 || find_asked(entry, block) != NULL) {
			block++;
			continue;
		}
		sync_ring();
		while (result == WIRE_OK && ring_length > 0 && (ring_length == MAX_ASKED || asked_pages() + count > MAX_ASKED_PAGES))
			result = receive_prefetched(deadline_ms);
		if (result == WIRE_OK)
			result = ask(fd, entry, block, count, false, deadline_ms);
		block += count;
	}
	if (result != WIRE_OK)
		no_prefetch_before_ms = now_ms() + 1000; /* advice is not worth waiting for */
	restore_signals(&signals);
	errno = saved;
}

/* --- writing, cutting and removing --- */

int pages_claim(struct claim *claim, const struct map_entry *entry, uint32_t first, uint32_t end)
{
	if (end > entry->blocks)
		end = entry->blocks;
	if (first > end)
		first = end;
	*claim = (struct claim){.entry = entry, .first = first, .end = end};
	block_signals(&claim->signals);
	_Atomic uint8_t *states = map_states(entry);
	int64_t deadline_ms = now_ms() + config.fetch_timeout_ms + 5000;
	for (uint32_t block = first; block < end; block++) {
		while (!claim_one(&states[block])) {
			if (atomic_load_explicit(&states[block], memory_order_acquire) == PAGE_PRESENT)
				break;
			if (!wait_for_claim(&states[block], deadline_ms)) {
				claim->end = block;
				pages_release(claim, first);
				return give_up(entry, block, "another process did not finish fetching or writing it");
			}
		}
	}
	return 0;
}

void pages_release(struct claim *claim, uint32_t present_end)
{
	int saved = errno;
	_Atomic uint8_t *states = map_states(claim->entry);
	for (uint32_t block = claim->first; block < claim->end; block++)
		if (atomic_load(&states[block]) != PAGE_PRESENT)
			set_state(&states[block], block < present_end ? PAGE_PRESENT : PAGE_ABSENT);
	restore_signals(&claim->signals);
	errno = saved;
}
