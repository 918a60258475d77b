/*
 * One message of little WAL at a time. A walsender sends what is there whenever a backend has flushed something, so with several clients almost every
 * commit is a message of its own, which wakes the walsender, then the proposer. But the proposer brings small appends to a quorum in rounds: what comes
 * before the last one is answered waits there. Here it waits in Postgres instead, costs nothing, and leaves as one message.
 *
 * So after such a message, before it sleeps, the walsender first waits for its client alone, for MOST_WAIT_MS at most: a client that says nothing, as
 * pg_receivewal, gets WAL that much later. Its latch can be set meanwhile, and ends the sleep that follows; signals with a handler end the wait. It must be
 * this moment, in WalSndWait: from Postgres 16 on who flushes WAL wakes only those that have prepared to sleep.
 *
 * The messages: "Streaming Replication Protocol" in Postgres' documentation, and XLogSendPhysical in replication/walsender.c, which sends each by itself.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/socket.h>

#include "shim.h"

/* Bytes of the last messages, each counted half as much as the next; with more there is much WAL on its way, which is not slowed. */
#define MOST_RECENT_BYTES 32768
#define MOST_WAIT_MS 2

/* CopyData is 'd' and four bytes of length; what it holds begins with 'w' when that is WAL. */
#define KIND_OFFSET 5

static ssize_t (*real_send)(int, const void *, size_t, int);
static int (*real_epoll_wait)(int, struct epoll_event *, int, int);
/* Postgres' own (replication/walsender.c); NULL in other programs. */
static const bool *am_walsender, *am_db_walsender;
/* The socket on which a message of WAL was sent since the last wait, or -1. */
static int unanswered_fd = -1;
static size_t recent_bytes;

static void resolve(void)
{
	am_walsender = dlsym(RTLD_DEFAULT, "am_walsender");
	am_db_walsender = dlsym(RTLD_DEFAULT, "am_db_walsender");
	*(void **)&real_epoll_wait = dlsym(RTLD_NEXT, "epoll_wait");
	*(void **)&real_send = dlsym(RTLD_NEXT, "send");
}

static bool is_physical_walsender(void)
{
	return am_walsender != NULL && *am_walsender && am_db_walsender != NULL && !*am_db_walsender;
}

EXPORT ssize_t send(int fd, const void *bytes, size_t length, int flags)
{
	if (__builtin_expect(real_send == NULL, 0))
		resolve();
	ssize_t sent = real_send(fd, bytes, length, flags);
	const char *message = bytes;
	if (is_physical_walsender() && sent > KIND_OFFSET && message[0] == 'd' && message[KIND_OFFSET] == 'w') {
		recent_bytes = recent_bytes / 2 + (size_t)sent;
		unanswered_fd = recent_bytes <= MOST_RECENT_BYTES ? fd : -1;
	}
	return sent;
}

EXPORT int epoll_wait(int epoll, struct epoll_event *events, int most, int timeout)
{
	if (__builtin_expect(real_epoll_wait == NULL, 0))
		resolve();
	if (unanswered_fd >= 0 && (timeout < 0 || timeout > MOST_WAIT_MS) && is_physical_walsender()) {
		struct pollfd client = {.fd = unanswered_fd, .events = POLLIN};
		unanswered_fd = -1;
		poll(&client, 1, MOST_WAIT_MS);
	}
	return real_epoll_wait(epoll, events, most, timeout);
}
