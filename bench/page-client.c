/*
 * For benchmarks: asks a page server for pages as a backend of Postgres does, by the page shim's own connection (compute/shim/wire.c): a request is written to
 * a socket that blocks, and the header and the pages of its answer are read from it. First single pages at random, each after the one before; then others
 * in batches, of which two are under way at a time, as in the shim's scans.
 *
 *   page-client HOST PORT TOKEN_FILE TIMELINE LSN SPC DB REL FIRST BLOCKS SINGLES BATCH SEED
 *
 * Single pages come from the first half of the blocks [FIRST, FIRST + BLOCKS), batches of BATCH from the second. To standard output: a line with the
 * nanoseconds of each single page; then one with the processor time of the process that started this one, which is the server, for all of these; how many bytes
 * of pages the batches were; how long they took; and the server's processor time for them; times in nanoseconds.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "../src/compute/shim/shim.h"

#define TIMEOUT_MS 30000

struct shim_config config;
/* Here nothing stands before libc. */
struct real_calls real = {.open = open, .close = close, .fcntl = fcntl, .read = read};

static uint8_t pages[256 * PAGE_SIZE_BYTES];
static struct page_request request = {.op = OP_GET_PAGES};

void shim_log(const char *format, ...)
{
	va_list arguments;
	va_start(arguments, format);
	vfprintf(stderr, format, arguments);
	va_end(arguments);
	fputc('\n', stderr);
}

static void fail(const char *what)
{
	fprintf(stderr, "page-client: %s\n", what);
	exit(1);
}

static int64_t clock_ns(clockid_t clock)
{
	struct timespec time;
	if (clock_gettime(clock, &time) != 0)
		fail("no such clock");
	return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

static void ask(uint32_t block, uint32_t count)
{
	request.request_id++;
	request.block = block;
	request.count = count;
	if (wire_send(&request, sizeof request, now_ms() + TIMEOUT_MS) != WIRE_OK)
		fail("the connection was lost");
}

/* The answer to the oldest request. */
static void receive(uint32_t request_id, uint32_t count)
{
	struct page_response response;
	int64_t deadline_ms = now_ms() + TIMEOUT_MS;
	if (wire_receive(&response, sizeof response, deadline_ms) != WIRE_OK)
		fail("the connection was lost");
	if (response.request_id != request_id || response.status != 0 || response.length != count * PAGE_SIZE_BYTES)
		fail("what came is not the pages that were asked for");
	if (wire_receive(pages, response.length, deadline_ms) != WIRE_OK)
		fail("the connection was lost");
}

/* Marsaglia's xorshift; never zero. */
static uint32_t state;

static uint32_t random_below(uint32_t end)
{
	state ^= state << 13;
	state ^= state >> 17;
	state ^= state << 5;
	return (uint32_t)((uint64_t)state * end >> 32);
}

static uint32_t number(const char *text) { return (uint32_t)strtoul(text, NULL, 10); }

int main(int argc, char **argv)
{
	if (argc != 14)
		fail("13 arguments are wanted");
	snprintf(config.host, sizeof config.host, "%s", argv[1]);
	snprintf(config.port, sizeof config.port, "%s", argv[2]);
	snprintf(config.token_file, sizeof config.token_file, "%s", argv[3]);
	snprintf(config.timeline, sizeof config.timeline, "%s", argv[4]);
	request.lsn = strtoull(argv[5], NULL, 10);
	request.spc = number(argv[6]);
	request.db = number(argv[7]);
	request.rel = number(argv[8]);
	uint32_t first = number(argv[9]), half = number(argv[10]) / 2, singles = number(argv[11]), batch = number(argv[12]);
	state = 2463534242u ^ number(argv[13]);
	if (half == 0 || batch == 0 || batch > sizeof pages / PAGE_SIZE_BYTES)
		fail("there are no such pages to ask for");
	int64_t *took_ns = calloc(singles, sizeof *took_ns);
	if (took_ns == NULL || wire_connect(now_ms() + TIMEOUT_MS) != WIRE_OK)
		fail("no connection");

	clockid_t server;
	if (clock_getcpuclockid(getppid(), &server) != 0)
		fail("the processor time of the server is not to be had");

	int64_t singles_server_ns = clock_ns(server);
	for (uint32_t i = 0; i < singles; i++) {
		uint32_t block = first + random_below(half);
		int64_t start_ns = clock_ns(CLOCK_MONOTONIC);
		ask(block, 1);
		receive(request.request_id, 1);
		took_ns[i] = clock_ns(CLOCK_MONOTONIC) - start_ns;
	}
	singles_server_ns = clock_ns(server) - singles_server_ns;

	int64_t batches_server_ns = clock_ns(server), start_ns = clock_ns(CLOCK_MONOTONIC);
	uint32_t batches = half / batch;
	for (uint32_t i = 0; i < batches; i++) {
		ask(first + half + i * batch, batch);
		if (i > 0)
			receive(request.request_id - 1, batch);
	}
	if (batches > 0)
		receive(request.request_id, batch);
	int64_t batches_ns = clock_ns(CLOCK_MONOTONIC) - start_ns;
	batches_server_ns = clock_ns(server) - batches_server_ns;

	for (uint32_t i = 0; i < singles; i++)
		printf(i == 0 ? "%lld" : " %lld", (long long)took_ns[i]);
	printf("\n%lld %llu %lld %lld\n", (long long)singles_server_ns, (unsigned long long)batches * batch * PAGE_SIZE_BYTES,
	       (long long)batches_ns, (long long)batches_server_ns);
	return 0;
}
