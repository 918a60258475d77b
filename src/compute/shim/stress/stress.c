/*
 * Hammers one relation file through the shim from many processes and checks every byte that comes back.
 *
 *   stress <relative path> <blocks> <processes> <milliseconds> <seed>      with the data directory as working directory
 *
 * Shared memory says what each page must hold: the pageserver's version 0, a version that was written, or zeroes. Processes take turns on
 * a page as Postgres' buffer locks make them (reads and writes of one page exclude each other, truncation excludes all); readahead and prefetch
 * ignore the locks, as they do in Postgres. A fetched page that lands on a written one, an old page after a truncation, a torn page or a page
 * of zeroes ends in a line that says which, and SIGKILL for the whole process group.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 8192
#define ZEROES UINT32_MAX
#define MAX_PIECES 16

struct shared {
	pthread_rwlock_t file; /* written by whoever cuts or replaces the file */
	uint32_t replaced;     /* grows when the file is another */
	uint32_t size;         /* in pages */
	uint64_t operations;
	struct {
		pthread_mutex_t lock;
		uint32_t version;
	} page[];
};

static struct shared *shared;
static const char *path;
static uint32_t max_blocks;
static int fd = -1;
static uint32_t fd_of = UINT32_MAX;
static uint64_t random_state;
static int64_t changes_from_ms;

static uint32_t random_below(uint32_t limit)
{
	random_state = random_state * 6364136223846793005u + 1442695040888963407u;
	return (uint32_t)((random_state >> 33) % limit);
}

static _Noreturn void fail(const char *what, uint32_t block)
{
	fprintf(stderr, "stress: %s, block %u, version %u: %s\n", what, block, block < max_blocks ? shared->page[block].version : 0, strerror(errno));
	kill(0, SIGKILL); /* others may wait for a lock of ours: end the whole group, which is the program's own */
	exit(1);
}

/* The same in stress.test.ts: an LSN of 1, then words made of block and version. */
static void fill(uint8_t *page, uint32_t block, uint32_t version)
{
	uint32_t *words = (uint32_t *)page;
	if (version == ZEROES) {
		memset(page, 0, PAGE);
		return;
	}
	words[0] = 0;
	words[1] = 1;
	for (uint32_t i = 2; i < PAGE / 4; i++)
		words[i] = (block * 2654435761u) ^ (version * 40503u) ^ i;
}

static void check(const uint8_t *page, uint32_t block, const char *what)
{
	uint8_t expected[PAGE];
	fill(expected, block, shared->page[block].version);
	if (memcmp(page, expected, PAGE) != 0) {
		uint32_t word;
		memcpy(&word, page + 8, 4);
		fprintf(stderr, "stress: first word %x, expected %x, words[1] %x\n", word, ((uint32_t *)expected)[2], ((uint32_t *)page)[1]);
		fail(what, block);
	}
}

static void reopen(void)
{
	if (fd_of == shared->replaced && random_below(50) != 0)
		return;
	if (fd >= 0)
		close(fd);
	fd = open(path, O_RDWR);
	if (fd < 0)
		fail("open", 0);
	fd_of = shared->replaced;
}

static void lock_pages(uint32_t first, uint32_t count)
{
	for (uint32_t i = 0; i < count; i++)
		pthread_mutex_lock(&shared->page[first + i].lock);
}

static void unlock_pages(uint32_t first, uint32_t count)
{
	for (uint32_t i = 0; i < count; i++)
		pthread_mutex_unlock(&shared->page[first + i].lock);
}

static uint8_t pages[MAX_PIECES][PAGE];

static void read_some(uint32_t first, uint32_t count)
{
	struct iovec parts[MAX_PIECES];
	for (uint32_t i = 0; i < count; i++)
		parts[i] = (struct iovec){pages[i], PAGE};
	lock_pages(first, count);
	ssize_t got;
	if (count == 1 && random_below(4) == 0) {
		lseek(fd, (off_t)first * PAGE, SEEK_SET);
		got = read(fd, pages[0], PAGE);
	} else if (count == 1) {
		got = pread(fd, pages[0], PAGE, (off_t)first * PAGE);
	} else {
		got = preadv(fd, parts, (int)count, (off_t)first * PAGE);
	}
	if (got != (ssize_t)count * PAGE)
		fail("short or failed read", first);
	for (uint32_t i = 0; i < count; i++)
		check(pages[i], first + i, "read");
	unlock_pages(first, count);
}

static void write_some(uint32_t first, uint32_t count)
{
	struct iovec parts[MAX_PIECES];
	lock_pages(first, count);
	for (uint32_t i = 0; i < count; i++) {
		uint32_t version = shared->page[first + i].version;
		shared->page[first + i].version = version == ZEROES ? 1 : version + 1;
		fill(pages[i], first + i, shared->page[first + i].version);
		parts[i] = (struct iovec){pages[i], PAGE};
	}
	ssize_t put = count == 1 ? pwrite(fd, pages[0], PAGE, (off_t)first * PAGE) : pwritev(fd, parts, (int)count, (off_t)first * PAGE);
	if (put != (ssize_t)count * PAGE)
		fail("short or failed write", first);
	unlock_pages(first, count);
}

/* Writes into the middle of a page the bytes that it must have there anyway: the others must stay. */
static void write_part(uint32_t block)
{
	lock_pages(block, 1);
	fill(pages[0], block, shared->page[block].version);
	uint32_t at = random_below(PAGE - 200), length = 1 + random_below(200);
	if (pwrite(fd, pages[0] + at, length, (off_t)block * PAGE + at) != (ssize_t)length)
		fail("short or failed write of a part", block);
	unlock_pages(block, 1);
}

static void change_size(void)
{
	uint32_t size = random_below(shared->size + 1);
	if (random_below(2) == 0 ? ftruncate(fd, (off_t)size * PAGE) : truncate(path, (off_t)size * PAGE))
		fail("truncate", size);
	uint32_t grown = size + random_below(max_blocks - size + 1);
	if (random_below(2) == 0) {
		if (ftruncate(fd, (off_t)grown * PAGE) != 0)
			fail("growing", grown);
	} else if (grown > size && posix_fallocate(fd, (off_t)size * PAGE, (off_t)(grown - size) * PAGE) != 0) {
		fail("posix_fallocate", grown);
	}
	for (uint32_t block = size; block < max_blocks; block++)
		shared->page[block].version = ZEROES;
	shared->size = grown;
}

/* The file is dropped and made anew, as a file number that comes back. */
static void replace_file(void)
{
	if (unlink(path) != 0)
		fail("unlink", 0);
	close(fd);
	fd = open(path, O_RDWR | O_CREAT | O_EXCL, 0600);
	if (fd < 0 || ftruncate(fd, (off_t)max_blocks * PAGE) != 0)
		fail("creating", 0);
	for (uint32_t block = 0; block < max_blocks; block++)
		shared->page[block].version = ZEROES;
	shared->size = max_blocks;
	fd_of = ++shared->replaced;
}

static int64_t now_ms(void)
{
	struct timespec now;
	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

static void operate(bool may_replace)
{
	uint32_t dice = random_below(1000);
	/* Cutting and replacing make all pages local, so they are kept for the end of a run. */
	if (dice == 0 && random_below(10) == 0 && now_ms() > changes_from_ms) {
		pthread_rwlock_wrlock(&shared->file);
		reopen();
		if (may_replace && random_below(4) == 0)
			replace_file();
		else
			change_size();
		pthread_rwlock_unlock(&shared->file);
		return;
	}
	pthread_rwlock_rdlock(&shared->file);
	reopen();
	uint32_t size = shared->size;
	if (size > 0) {
		/* Half of all operations fall on few pages, so that processes meet. */
		uint32_t first = random_below(2) == 0 ? random_below(size) : (uint32_t)(shared->operations / 64 % size);
		uint32_t count = 1 + random_below(MAX_PIECES);
		if (count > size - first)
			count = size - first;
		if (dice < 400)
			read_some(first, 1);
		else if (dice < 600)
			read_some(first, count);
		else if (dice < 750)
			write_some(first, 1);
		else if (dice < 800)
			write_some(first, count);
		else if (dice < 850)
			write_part(first);
		else if (posix_fadvise(fd, (off_t)first * PAGE, (off_t)count * PAGE, POSIX_FADV_WILLNEED) != 0)
			fail("posix_fadvise", first);
	}
	pthread_rwlock_unlock(&shared->file);
	__atomic_fetch_add(&shared->operations, 1, __ATOMIC_RELAXED);
}

static volatile sig_atomic_t signals;
static void on_signal(int number) { signals += number > 0; }

static void work(uint64_t seed, int64_t end_ms)
{
	random_state = seed;
	struct sigaction action = {.sa_handler = on_signal};
	sigaction(SIGALRM, &action, NULL);
	struct itimerval interval = {{0, 700}, {0, 700}};
	setitimer(ITIMER_REAL, &interval, NULL);
	while (now_ms() < end_ms) {
		operate(true);
		if (random_below(300) == 0) { /* the child inherits a connection and descriptors, and must use neither's state */
			pid_t child = fork();
			if (child == 0) {
				random_state ^= (uint64_t)getpid() << 20;
				for (int i = 0; i < 20; i++)
					operate(false);
				exit(0);
			}
			int status;
			while (waitpid(child, &status, 0) < 0 && errno == EINTR)
				;
			if (status != 0)
				fail("a child ended", 0);
		}
	}
}

int main(int argc, char **argv)
{
	if (argc != 6)
		return 2;
	setpgid(0, 0);
	path = argv[1];
	max_blocks = (uint32_t)atoi(argv[2]);
	int processes = atoi(argv[3]);
	int64_t end_ms = now_ms() + atoi(argv[4]);
	changes_from_ms = end_ms - atoi(argv[4]) / 3;
	uint64_t seed = strtoull(argv[5], NULL, 10);
	size_t length = sizeof *shared + max_blocks * sizeof shared->page[0];
	shared = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (shared == MAP_FAILED)
		return 2;
	pthread_mutexattr_t mutex;
	pthread_mutexattr_init(&mutex);
	pthread_mutexattr_setpshared(&mutex, PTHREAD_PROCESS_SHARED);
	pthread_rwlockattr_t rwlock;
	pthread_rwlockattr_init(&rwlock);
	pthread_rwlockattr_setpshared(&rwlock, PTHREAD_PROCESS_SHARED);
	pthread_rwlock_init(&shared->file, &rwlock);
	for (uint32_t block = 0; block < max_blocks; block++)
		pthread_mutex_init(&shared->page[block].lock, &mutex);
	shared->size = max_blocks;

	for (int i = 0; i < processes; i++)
		if (fork() == 0) {
			work(seed * 1000 + (uint64_t)i, end_ms);
			exit(0);
		}
	int status;
	while (wait(&status) > 0)
		if (status != 0)
			fail("a process ended", 0);
	random_state = seed;
	reopen();
	for (uint32_t block = 0; block < shared->size; block++)
		read_some(block, 1);
	printf("%llu operations, %u pages at the end, replaced %u times\n", (unsigned long long)shared->operations, shared->size, shared->replaced);
	return 0;
}
