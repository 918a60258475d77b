/*
 * The connection to the pageserver: one TCP connection per process, made on the first miss. A socket does not survive fork: a child that finds
 * its parent's makes its own.
 *
 *   client: {u32 magic "STRP", u16 version, u16 token length, token, 32 bytes of timeline id in hex}
 *   server: {u32 status, u32 message length, message}
 *   then requests and responses as in format.h, responses in the order of requests
 *
 * The socket blocks, with a receive timeout of one tick so that deadlines are looked at. Any surprise drops the connection: what
 * was asked on it is asked again on another.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#include "shim.h"

/* A peer that is gone without a word is noticed after this long with bytes under way. */
#define USER_TIMEOUT_MS 10000
#define TICK_MS 500
#define CONNECT_TIMEOUT_MS 5000
#define MAX_TOKEN_BYTES 4096

static struct {
	int fd;
	pid_t pid;
	ino_t inode; /* of the socket: the number may have become something else in a child */
	uint64_t generation;
	int64_t refusal_logged_ms;
} connection = {.fd = -1};

int64_t now_ms(void)
{
	struct timespec now;
	clock_gettime(CLOCK_MONOTONIC, &now);
	return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

/* Closes the socket, unless somebody did that behind our back and its number is something else by now. */
static void forget_connection(void)
{
	struct stat status;
	if (fstat(connection.fd, &status) == 0 && S_ISSOCK(status.st_mode) && status.st_ino == connection.inode)
		real.close(connection.fd);
	connection.fd = -1;
	connection.generation++;
}

/* After a fork the parent's connection is here too. */
static void leave_parents_connection(void)
{
	if (connection.fd >= 0 && connection.pid != getpid())
		forget_connection();
}

int wire_fd(void)
{
	return connection.fd >= 0 && connection.pid == getpid() ? connection.fd : -1;
}

uint64_t wire_generation(void)
{
	leave_parents_connection();
	return connection.generation;
}

void wire_drop(void)
{
	leave_parents_connection();
	if (connection.fd >= 0)
		forget_connection();
}

enum wire_result wire_send(const void *bytes, size_t length, int64_t deadline_ms)
{
	const char *at = bytes;
	while (length > 0) {
		ssize_t sent = send(connection.fd, at, length, MSG_NOSIGNAL);
		if (sent > 0) {
			at += sent;
			length -= (size_t)sent;
			continue;
		}
		if (sent < 0 && (errno == EINTR || errno == EAGAIN) && now_ms() < deadline_ms)
			continue;
		wire_drop();
		return WIRE_LOST;
	}
	return WIRE_OK;
}

enum wire_result wire_receive(void *bytes, size_t length, int64_t deadline_ms)
{
	char *at = bytes;
	while (length > 0) {
		ssize_t got = recv(connection.fd, at, length, MSG_WAITALL);
		if (got > 0) {
			at += got;
			length -= (size_t)got;
			continue;
		}
		if (got < 0 && (errno == EINTR || errno == EAGAIN) && now_ms() < deadline_ms)
			continue;
		wire_drop();
		return WIRE_LOST;
	}
	return WIRE_OK;
}

/* A connected socket, or -1. */
static int connect_to(const struct sockaddr *address, socklen_t length, int64_t deadline_ms)
{
	int fd = socket(address->sa_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (fd < 0)
		return -1;
	if (connect(fd, address, length) != 0) {
		int error = errno;
		while (error == EINPROGRESS || error == EINTR) {
			int64_t left = deadline_ms - now_ms();
			struct pollfd waited = {.fd = fd, .events = POLLOUT};
			int ready = left <= 0 ? 0 : poll(&waited, 1, (int)(left > CONNECT_TIMEOUT_MS ? CONNECT_TIMEOUT_MS : left));
			if (ready < 0 && errno == EINTR)
				continue;
			socklen_t size = sizeof error;
			if (ready <= 0 || getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &size) != 0)
				error = ETIMEDOUT;
		}
		if (error != 0) {
			real.close(fd);
			return -1;
		}
	}
	int on = 1, user_timeout = USER_TIMEOUT_MS, idle_s = 10, interval_s = 5, probes = 3;
	struct timeval tick = {.tv_usec = TICK_MS * 1000};
	real.fcntl(fd, F_SETFL, real.fcntl(fd, F_GETFL) & ~O_NONBLOCK);
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
	setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &user_timeout, sizeof user_timeout);
	setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on);
	setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle_s, sizeof idle_s);
	setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &interval_s, sizeof interval_s);
	setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &probes, sizeof probes);
	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &tick, sizeof tick);
	setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &tick, sizeof tick);
	return fd;
}

static int connect_to_host(int64_t deadline_ms)
{
	int port = 0;
	for (const char *digit = config.port; *digit >= '0' && *digit <= '9' && port < 65536; digit++)
		port = port * 10 + (*digit - '0');
	struct sockaddr_in v4 = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
	if (inet_pton(AF_INET, config.host, &v4.sin_addr) == 1)
		return connect_to((struct sockaddr *)&v4, sizeof v4, deadline_ms);
	struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *found = NULL;
	if (getaddrinfo(config.host, config.port, &hints, &found) != 0)
		return -1;
	int fd = -1;
	for (struct addrinfo *each = found; each != NULL && fd < 0; each = each->ai_next)
		fd = connect_to(each->ai_addr, each->ai_addrlen, deadline_ms);
	freeaddrinfo(found);
	return fd;
}

/* Length of the hello, or 0 when the token cannot be read. */
static size_t make_hello(uint8_t *hello)
{
	uint8_t *token = hello + 8;
	int fd = real.open(config.token_file, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return 0;
	ssize_t length = real.read(fd, token, MAX_TOKEN_BYTES);
	real.close(fd);
	while (length > 0 && (token[length - 1] == '\n' || token[length - 1] == ' '))
		length--;
	if (length <= 0)
		return 0;
	uint32_t magic = HELLO_MAGIC;
	uint16_t version = HELLO_VERSION, token_length = (uint16_t)length;
	memcpy(hello, &magic, 4);
	memcpy(hello + 4, &version, 2);
	memcpy(hello + 6, &token_length, 2);
	memcpy(token + length, config.timeline, TIMELINE_HEX_LENGTH);
	return 8 + (size_t)length + TIMELINE_HEX_LENGTH;
}

static void log_refusal(const char *reason)
{
	if (connection.refusal_logged_ms != 0 && now_ms() - connection.refusal_logged_ms < LOG_INTERVAL_MS)
		return;
	connection.refusal_logged_ms = now_ms();
	shim_log("the pageserver at %s:%s refused the connection: %s", config.host, config.port, reason);
}

enum wire_result wire_connect(int64_t deadline_ms)
{
	leave_parents_connection();
	if (connection.fd >= 0)
		return WIRE_OK;
	uint8_t hello[8 + MAX_TOKEN_BYTES + TIMELINE_HEX_LENGTH];
	size_t length = make_hello(hello);
	if (length == 0) {
		log_refusal("there is no token in the token file");
		return WIRE_REFUSED;
	}
	int fd = connect_to_host(deadline_ms);
	if (fd < 0)
		return WIRE_LOST;
	struct stat status;
	connection.fd = fd;
	connection.pid = getpid();
	connection.inode = fstat(fd, &status) == 0 ? status.st_ino : 0;
	struct hello_reply reply;
	char message[256];
	if (wire_send(hello, length, deadline_ms) != WIRE_OK || wire_receive(&reply, sizeof reply, deadline_ms) != WIRE_OK)
		return WIRE_LOST;
	if (reply.message_length > MAX_MESSAGE_BYTES) {
		wire_drop();
		return WIRE_LOST;
	}
	uint32_t shown = 0;
	for (uint32_t left = reply.message_length; left > 0;) {
		uint32_t part = left < sizeof message - 1 ? left : (uint32_t)sizeof message - 1;
		char ignored[sizeof message];
		if (wire_receive(shown == 0 ? message : ignored, part, deadline_ms) != WIRE_OK)
			return WIRE_LOST;
		if (shown == 0)
			shown = part;
		left -= part;
	}
	message[shown] = '\0';
	if (reply.status == 0)
		return WIRE_OK;
	wire_drop();
	log_refusal(message);
	return WIRE_REFUSED;
}
