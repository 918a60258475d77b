/*
 * One message of little WAL at a time. A walsender sends what is there whenever a backend has flushed something, so with several clients almost every
 * commit is a message of its own, which wakes the walsender, then the proposer. But the proposer brings small appends to a quorum in rounds: what comes
 * before the last one is answered waits there. Here it waits in Postgres instead, costs nothing, and leaves as one message.
 *
 * So after such a message the walsender waits until its client has said that it is flushed, and at most for MOST_WAIT_MS after the last that it said: a client that
 * says nothing, as pg_receivewal, gets WAL that much later. Signals with a handler end the wait. It waits at two places:
 *   - before it would sleep, in WalSndWait. It has prepared to sleep then, so its latch is set by who flushes WAL meanwhile, and ends the sleep that follows.
 *   - when it has read an answer to an earlier message and finds no other, in ProcessRepliesIfAny, right before it looks for WAL to send. Two messages under
 *     way, each sent when the one before it was answered, would go on for ever, and each commit would wait for three rounds instead of two.
 *
 * The messages: "Streaming Replication Protocol" in Postgres' documentation, and XLogSendPhysical in replication/walsender.c, which sends each by itself.
 */
#define _GNU_SOURCE
#include <endian.h>
#include <errno.h>
#include <poll.h>
#include <stdint.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>

#include "shim.h"

/* Bytes of the last messages, each counted half as much as the next; with more there is much WAL on its way, which is not slowed. */
#define MOST_RECENT_BYTES 32768
#define MOST_WAIT_MS 2

/* CopyData is 'd', four bytes of length, and what it holds: 'w', the LSN, 16 bytes and WAL; or, from the client, 'r' and the LSNs written, flushed and applied,
 * and 9 bytes. */
#define KIND_OFFSET 5
#define LSN_OFFSET 6
#define WAL_OFFSET 30
#define STATUS_BYTES 39
#define FLUSHED_OFFSET 14

/* Postgres' own (replication/walsender.c); without an address in other programs. */
extern bool am_walsender __attribute__((weak));
extern bool am_db_walsender __attribute__((weak));

static int client_fd = -1;
/* End of the last message of WAL, and what is not waited for any more. */
static uint64_t sent_lsn, answered_lsn;
static size_t recent_bytes;

static bool is_physical_walsender(void)
{
	return &am_walsender != NULL && am_walsender && &am_db_walsender != NULL && !am_db_walsender;
}

static uint64_t big_endian(const unsigned char *at)
{
	uint64_t value;
	memcpy(&value, at, sizeof value);
	return be64toh(value);
}

static bool is_unanswered(void) { return answered_lsn < sent_lsn; }

/* True when the client has said something; else nothing is waited for before the next message. */
static bool wait_for_client(void)
{
	struct pollfd client = {.fd = client_fd, .events = POLLIN};
	if (poll(&client, 1, MOST_WAIT_MS) > 0)
		return true;
	answered_lsn = sent_lsn;
	return false;
}

/* Postgres reads the first byte of a message by itself. What follows is the rest of it, and whole ones: of those that tell the status the last one counts. */
static void read_answer(const unsigned char *rest, size_t length)
{
	size_t last = length + 1 - STATUS_BYTES; /* where the last message would begin, the byte before `rest` being 0 */
	bool is_status = length + 1 >= STATUS_BYTES && (length + 1) % STATUS_BYTES == 0 && rest[last + KIND_OFFSET - 1] == 'r';
	answered_lsn = is_status ? big_endian(rest + last + FLUSHED_OFFSET - 1) : sent_lsn;
}

EXPORT ssize_t send(int fd, const void *bytes, size_t length, int flags)
{
	ready();
	ssize_t sent = real.send(fd, bytes, length, flags);
	const unsigned char *message = bytes;
	if (is_physical_walsender() && sent > WAL_OFFSET && message[0] == 'd' && message[KIND_OFFSET] == 'w') {
		client_fd = fd;
		sent_lsn = big_endian(message + LSN_OFFSET) + (uint64_t)(sent - WAL_OFFSET);
		recent_bytes = recent_bytes / 2 + (size_t)sent;
		if (recent_bytes > MOST_RECENT_BYTES)
			answered_lsn = sent_lsn;
	}
	return sent;
}

EXPORT ssize_t recv(int fd, void *bytes, size_t length, int flags)
{
	ready();
	ssize_t got = real.recv(fd, bytes, length, flags);
	if (fd != client_fd || !is_unanswered())
		return got;
	if (got < 0 && errno == EAGAIN) {
		if (wait_for_client())
			got = real.recv(fd, bytes, length, flags);
		else
			errno = EAGAIN;
	} else if (got > 1) {
		read_answer(bytes, (size_t)got);
	}
	return got;
}

EXPORT int epoll_wait(int epoll, struct epoll_event *events, int most, int timeout)
{
	ready();
	if (client_fd >= 0 && is_unanswered() && (timeout < 0 || timeout > MOST_WAIT_MS))
		wait_for_client();
	return real.epoll_wait(epoll, events, most, timeout);
}
