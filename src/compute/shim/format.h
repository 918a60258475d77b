/*
 * The bytes that the shim shares with others: the page map file (written by src/compute/page-map.ts, which repeats this table) and the page
 * protocol (src/api/pages.ts). All integers are little-endian; the shim runs on little-endian machines only, as Postgres' own files
 * in this system do.
 *
 * Page map: one file per compute, outside its data directory, mapped shared by every process of that compute.
 *
 *   offset  size  field
 *        0     8  magic "STRPGMAP"
 *        8     4  version, 1
 *       12     4  CRC-32 (zlib's) of bytes [0, table end), with this field taken as zero
 *       16     8  start LSN: the LSN at which absent pages are fetched
 *       24     8  length of the file in bytes
 *       32     4  entry count
 *       36     4  index slot count: a power of two, larger than the entry count
 *       40     4  blocks per segment of a relation fork (131072)
 *       44     4  block size in bytes (8192)
 *       48     8  offset of the name words
 *       56     8  offset of the page states
 *       64    16  boot id of the machine: after a reboot the local files cannot be trusted, nothing was synced
 *       80    16  timeline id
 *       96     4  flags: 1 = the files are made on first use
 *      100    28  zero
 *      128   48n  entries, one per segment file that had blocks at the start (with flag 1 also one per file without):
 *                   0 spc, 4 db, 8 rel, 12 fork, 16 segment: the key, u32 each
 *                  20 rel, 24 fork: from where its pages are fetched (another fork for unlogged tables, else the same), u32 each
 *                  28 blocks of this segment at the start, u32
 *                  32 offset in this file of its page states, u64
 *                  40 zero, 8 bytes
 *        ·    4m  index: open addressing with linear probing; entry number + 1, or 0 for an empty slot; begins at hash(key) & (m - 1)
 *                 table end; zeroes up to the name words, which begin at a multiple of 64
 *        ·    4n  name words, one per entry: what is under the name of its file
 *                   0 the file of the start; with flag 1 it is not made yet, and whoever uses the name first makes it
 *                   1 nothing, or a file that this compute made after dropping the other: wholly local from then on
 *                   2 the file of the start, made on first use (with flag 1 only)
 *                   3 somebody is making it (with flag 1 only; waited for by a futex)
 *        ·     ·  page states, one byte per block, each entry's at a multiple of 64 (so that a state's aligned 4 bytes can be waited on):
 *                   0 absent    the local file does not have the page, the pageserver does; nobody here has ever changed it
 *                   1 claimed   one process is fetching or writing it; it, and only it, moves the state on
 *                   2 present   the local file has it; final
 *                   3 claimed, and somebody waits for it (a futex on the aligned 4 bytes)
 *
 * Everything before the table end never changes after the file is written. Blocks past an entry's count are always local.
 */
#ifndef STRATA_SHIM_FORMAT_H
#define STRATA_SHIM_FORMAT_H

#include <stdint.h>

#define PAGE_SIZE_BYTES 8192u
#define MAP_MAGIC "STRPGMAP"
#define MAP_VERSION 1u

enum { MAP_FILES_ON_FIRST_USE = 1 };
enum { NAME_AT_START = 0, NAME_GONE = 1, NAME_MADE = 2, NAME_BEING_MADE = 3 };
enum { PAGE_ABSENT = 0, PAGE_CLAIMED = 1, PAGE_PRESENT = 2, PAGE_CLAIMED_AWAITED = 3 };

struct map_header {
	char magic[8];
	uint32_t version;
	uint32_t crc;
	uint64_t start_lsn;
	uint64_t length;
	uint32_t entry_count;
	uint32_t slot_count;
	uint32_t blocks_per_segment;
	uint32_t block_size;
	uint64_t names_offset;
	uint64_t states_offset;
	uint8_t boot_id[16];
	uint8_t timeline[16];
	uint32_t flags;
	uint8_t zero[28];
};

struct map_entry {
	uint32_t spc, db, rel, fork, segment;
	uint32_t source_rel, source_fork;
	uint32_t blocks;
	uint64_t states_offset;
	uint64_t zero;
};

_Static_assert(sizeof(struct map_header) == 128, "the header of the page map is 128 bytes");
_Static_assert(sizeof(struct map_entry) == 48, "an entry of the page map is 48 bytes");
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the formats are little-endian");

#define HELLO_MAGIC 0x50525453u
#define HELLO_VERSION 1u
#define TIMELINE_HEX_LENGTH 32
#define OP_GET_PAGES 1u
#define MAX_RUN 128u /* pages per request; the protocol allows 256 */
#define MAX_MESSAGE_BYTES 65536u

struct hello_reply {
	uint32_t status; /* 0 welcome, else refused with a message */
	uint32_t message_length;
};

struct page_request {
	uint32_t op, request_id;
	uint64_t lsn;
	uint32_t spc, db, rel, fork, block, count;
};

struct page_response {
	uint32_t request_id;
	uint32_t status; /* 0: length is count pages; else the message of an error */
	uint32_t length;
	uint32_t reserved;
};

_Static_assert(sizeof(struct page_request) == 40, "a request of the page protocol is 40 bytes");
_Static_assert(sizeof(struct page_response) == 16, "a response header of the page protocol is 16 bytes");

#endif
