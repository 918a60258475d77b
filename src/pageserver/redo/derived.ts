/**
 * Derived changes: what a WAL record does to pages that it does not name as block references.
 *
 * Postgres' redo routines also clear visibility-map bits, set transaction statuses, record multixacts and trim the maps of a
 * truncated relation. The pageserver stores each such change under the key of the page it touches, as a value of kind 4. This
 * file is the codec of those values, the arithmetic that finds the page, and the code that applies them.
 *
 * A change is a subtype and a payload, which value.ts stores one after the other. Numbers are little-endian:
 *
 *   1 clear visibility       n × { u32 heap block, u8 flags }     flags: 2 = all-frozen only, 3 = both bits
 *   2 truncate visibility    u32 heap blocks that remain
 *   3 truncate free space    u32 heap blocks that remain
 *   4 transaction status     u8 status, n × u32 xid
 *   5 multixact offsets      n × { u32 multixact id, u32 offset }
 *   6 multixact members      u32 offset of the first, n × { u32 xid, u8 status }
 *   7 commit timestamps      i64 microseconds since 2000-01-01, u16 origin, n × u32 xid
 *
 * Invariants:
 * - A change concerns exactly one page: every entry in it falls on the page whose key it is stored under. The `…Changes`
 *   functions split what a record implies accordingly.
 * - One (key, LSN) holds one value, so a record that touches a page twice makes one change with two entries.
 * - None of these sets a page LSN. Pages of SLRUs have no header at all; Postgres leaves the LSN of a map page alone when it
 *   clears bits, because clearing is always safe (visibilitymap.c).
 * - A map page that is still all zeros becomes an initialised, empty page first, as when Postgres reads it.
 *
 * Sources: visibilitymap.c, freespace.c, fsmpage.c, clog.c, multixact.c, commit_ts.c.
 */
import assert from 'node:assert/strict';

const PAGE_SIZE = 8192;
const PAGE_HEADER_SIZE = 24;

export const DERIVED = {
  clearVisibility: 1,
  truncateVisibility: 2,
  truncateFreeSpace: 3,
  transactionStatus: 4,
  multixactOffsets: 5,
  multixactMembers: 6,
  commitTimestamps: 7,
} as const;

/** A change to one page, found by its block number in the map fork or its page number in the SLRU. */
export interface DerivedChange {
  readonly page: number;
  /** One of DERIVED. */
  readonly subtype: number;
  readonly payload: Buffer;
}

export const VISIBILITYMAP_ALL_VISIBLE = 0x01;
export const VISIBILITYMAP_ALL_FROZEN = 0x02;
export const VISIBILITYMAP_VALID_BITS = 0x03;

export const TRANSACTION_COMMITTED = 1;
export const TRANSACTION_ABORTED = 2;
export const TRANSACTION_SUB_COMMITTED = 3;

const MAP_SIZE = PAGE_SIZE - PAGE_HEADER_SIZE;
const HEAP_BLOCKS_PER_BYTE = 4;
export const HEAP_BLOCKS_PER_VISIBILITY_PAGE = MAP_SIZE * HEAP_BLOCKS_PER_BYTE;

/** The visibility-map block that holds the bits of a heap block. */
export function visibilityMapBlock(heapBlock: number): number {
  return Math.floor(heapBlock / HEAP_BLOCKS_PER_VISIBILITY_PAGE);
}

/** The offset in a visibility-map page of the byte that holds the bits of a heap block. */
export function visibilityMapByte(heapBlock: number): number {
  return PAGE_HEADER_SIZE + Math.floor((heapBlock % HEAP_BLOCKS_PER_VISIBILITY_PAGE) / HEAP_BLOCKS_PER_BYTE);
}

/** How far the bits of a heap block are shifted in their byte. */
export function visibilityMapShift(heapBlock: number): number {
  return (heapBlock % HEAP_BLOCKS_PER_BYTE) * 2;
}

export interface VisibilityClear {
  readonly heapBlock: number;
  /** VISIBILITYMAP_VALID_BITS or VISIBILITYMAP_ALL_FROZEN. */
  readonly flags: number;
}

/**
 * The map pages on which bits are cleared. Redo reads the map page with extension: the fork is at least `page + 1` blocks long
 * afterwards, even if it did not exist.
 */
export function clearVisibilityChanges(clears: readonly VisibilityClear[]): DerivedChange[] {
  return splitByPage(
    DERIVED.clearVisibility,
    clears,
    (clear) => visibilityMapBlock(clear.heapBlock),
    (entries) => {
      const payload = Buffer.alloc(entries.length * 5);
      entries.forEach((clear, index) => {
        assert(
          clear.flags === VISIBILITYMAP_VALID_BITS || clear.flags === VISIBILITYMAP_ALL_FROZEN,
          'all-visible is never cleared while all-frozen stays',
        );
        payload.writeUInt32LE(clear.heapBlock, index * 5);
        payload[4 + index * 5] = clear.flags;
      });
      return payload;
    },
  );
}

/**
 * What truncating a heap to `heapBlocks` does to its visibility map: the fork's new length (the fork only ever shrinks to it) and
 * the page whose tail is zeroed, if that page exists.
 */
export function truncateVisibility(heapBlocks: number): { mapBlocks: number; change: DerivedChange | undefined } {
  const page = visibilityMapBlock(heapBlocks);
  if (heapBlocks % HEAP_BLOCKS_PER_VISIBILITY_PAGE === 0) return { mapBlocks: page, change: undefined };
  return { mapBlocks: page + 1, change: { page, subtype: DERIVED.truncateVisibility, payload: u32(heapBlocks) } };
}

const FSM_NODES_PER_PAGE = PAGE_SIZE - PAGE_HEADER_SIZE - 4;
const FSM_UPPER_NODES_PER_PAGE = PAGE_SIZE / 2 - 1;
export const FSM_SLOTS_PER_PAGE = FSM_NODES_PER_PAGE - FSM_UPPER_NODES_PER_PAGE;
const FSM_TREE_DEPTH = 3;
const FSM_NODES_OFFSET = PAGE_HEADER_SIZE + 4;

/** The same for the free space map. */
export function truncateFreeSpace(heapBlocks: number): { mapBlocks: number; change: DerivedChange | undefined } {
  const page = freeSpaceMapBlock(heapBlocks);
  if (heapBlocks % FSM_SLOTS_PER_PAGE === 0) return { mapBlocks: page, change: undefined };
  return { mapBlocks: page + 1, change: { page, subtype: DERIVED.truncateFreeSpace, payload: u32(heapBlocks) } };
}

/** The block of the free-space-map fork that is the leaf page of a heap block: leaves come after the upper pages above them. */
function freeSpaceMapBlock(heapBlock: number): number {
  let leaf = Math.floor(heapBlock / FSM_SLOTS_PER_PAGE);
  let pages = 0;
  for (let level = 0; level < FSM_TREE_DEPTH; level++) {
    pages += leaf + 1;
    leaf = Math.floor(leaf / FSM_SLOTS_PER_PAGE);
  }
  return pages - 1;
}

export const TRANSACTIONS_PER_CLOG_PAGE = PAGE_SIZE * 4;

/** The clog pages on which the statuses of these transactions stand. */
export function transactionStatusChanges(status: number, xids: readonly number[]): DerivedChange[] {
  assert(status === TRANSACTION_COMMITTED || status === TRANSACTION_ABORTED, 'redo sets a final status');
  return splitByPage(
    DERIVED.transactionStatus,
    xids,
    (xid) => Math.floor(xid / TRANSACTIONS_PER_CLOG_PAGE),
    (entries) => {
      const payload = Buffer.alloc(1 + entries.length * 4);
      payload[0] = status;
      entries.forEach((xid, index) => payload.writeUInt32LE(xid, 1 + index * 4));
      return payload;
    },
  );
}

export interface MultixactMember {
  readonly xid: number;
  /** MultiXactStatus: 0 for key share … 5 update. */
  readonly status: number;
}

export const MULTIXACT_OFFSETS_PER_PAGE = PAGE_SIZE / 4;
const FIRST_MULTIXACT = 1;

/**
 * The pages of multixact offsets that a new multixact changes: its own offset, and that of the next one, which is where its members
 * end. Postgres has set the second since the minor releases of late 2025; on WAL from before them it comes to the same value.
 */
export function multixactOffsetChanges(multi: number, offset: number, memberCount: number): DerivedChange[] {
  const next = multi === 0xffffffff ? FIRST_MULTIXACT : multi + 1;
  const end = (offset + memberCount) % 2 ** 32;
  return splitByPage(
    DERIVED.multixactOffsets,
    [
      { multi, offset },
      { multi: next, offset: end === 0 ? 1 : end },
    ],
    (entry) => Math.floor(entry.multi / MULTIXACT_OFFSETS_PER_PAGE),
    (entries) => {
      const payload = Buffer.alloc(entries.length * 8);
      entries.forEach((entry, index) => {
        payload.writeUInt32LE(entry.multi, index * 8);
        payload.writeUInt32LE(entry.offset, 4 + index * 8);
      });
      return payload;
    },
  );
}

const MEMBERS_PER_GROUP = 4;
const MEMBER_GROUP_SIZE = 4 + MEMBERS_PER_GROUP * 4;
const MEMBER_GROUPS_PER_PAGE = Math.floor(PAGE_SIZE / MEMBER_GROUP_SIZE);
export const MULTIXACT_MEMBERS_PER_PAGE = MEMBER_GROUPS_PER_PAGE * MEMBERS_PER_GROUP;

/** The pages of multixact members on which a new multixact's members stand. Offsets wrap at 2^32. */
export function multixactMemberChanges(offset: number, members: readonly MultixactMember[]): DerivedChange[] {
  return splitByPage(
    DERIVED.multixactMembers,
    members.map((member, index) => ({ ...member, at: (offset + index) % 2 ** 32 })),
    (member) => Math.floor(member.at / MULTIXACT_MEMBERS_PER_PAGE),
    (entries) => {
      const payload = Buffer.alloc(4 + entries.length * 5);
      payload.writeUInt32LE(entries[0]?.at ?? 0, 0);
      entries.forEach((member, index) => {
        payload.writeUInt32LE(member.xid, 4 + index * 5);
        payload[8 + index * 5] = member.status;
      });
      return payload;
    },
  );
}

const COMMIT_TS_ENTRY_SIZE = 10;
export const COMMIT_TIMESTAMPS_PER_PAGE = Math.floor(PAGE_SIZE / COMMIT_TS_ENTRY_SIZE);

/** The pages of commit timestamps of these transactions; only where track_commit_timestamp is on. `timeUs` is a TimestampTz. */
export function commitTimestampChanges(timeUs: number, origin: number, xids: readonly number[]): DerivedChange[] {
  return splitByPage(
    DERIVED.commitTimestamps,
    xids,
    (xid) => Math.floor(xid / COMMIT_TIMESTAMPS_PER_PAGE),
    (entries) => {
      const payload = Buffer.alloc(10 + entries.length * 4);
      payload.writeBigInt64LE(BigInt(timeUs), 0);
      payload.writeUInt16LE(origin, 8);
      entries.forEach((xid, index) => payload.writeUInt32LE(xid, 10 + index * 4));
      return payload;
    },
  );
}

/**
 * Applies a change to its page in place. Throws RangeError when the change is not one of this file's: a value that cannot be
 * understood must stop the read.
 */
export function applyDerived(page: Buffer, subtype: number, payload: Buffer): void {
  assert.equal(page.length, PAGE_SIZE, 'a page is 8192 bytes');
  switch (subtype) {
    case DERIVED.clearVisibility:
      return applyClearVisibility(page, payload);
    case DERIVED.truncateVisibility:
      return applyTruncateVisibility(page, payload.readUInt32LE(0));
    case DERIVED.truncateFreeSpace:
      return applyTruncateFreeSpace(page, payload.readUInt32LE(0));
    case DERIVED.transactionStatus:
      return applyTransactionStatus(page, payload);
    case DERIVED.multixactOffsets:
      for (let at = 0; at < payload.length; at += 8) {
        page.writeUInt32LE(payload.readUInt32LE(at + 4), (payload.readUInt32LE(at) % MULTIXACT_OFFSETS_PER_PAGE) * 4);
      }
      return;
    case DERIVED.multixactMembers:
      return applyMultixactMembers(page, payload);
    case DERIVED.commitTimestamps:
      for (let at = 10; at < payload.length; at += 4) {
        const entry = (payload.readUInt32LE(at) % COMMIT_TIMESTAMPS_PER_PAGE) * COMMIT_TS_ENTRY_SIZE;
        payload.copy(page, entry, 0, 10);
      }
      return;
    default:
      throw new RangeError(`derived change of unknown subtype ${subtype}`);
  }
}

function applyClearVisibility(page: Buffer, payload: Buffer): void {
  initialiseIfNew(page);
  for (let at = 0; at < payload.length; at += 5) {
    const heapBlock = payload.readUInt32LE(at);
    const byte = visibilityMapByte(heapBlock);
    page[byte] = (page[byte] ?? 0) & ~((payload[at + 4] ?? 0) << visibilityMapShift(heapBlock));
  }
}

function applyTruncateVisibility(page: Buffer, heapBlocks: number): void {
  initialiseIfNew(page);
  const byte = visibilityMapByte(heapBlocks);
  page.fill(0, byte + 1);
  page[byte] = (page[byte] ?? 0) & ((1 << visibilityMapShift(heapBlocks)) - 1);
}

function applyTruncateFreeSpace(page: Buffer, heapBlocks: number): void {
  initialiseIfNew(page);
  const firstLeaf = FSM_UPPER_NODES_PER_PAGE + (heapBlocks % FSM_SLOTS_PER_PAGE);
  const nodes = page.subarray(FSM_NODES_OFFSET, FSM_NODES_OFFSET + FSM_NODES_PER_PAGE);
  if (nodes.subarray(firstLeaf).every((node) => node === 0)) return;
  nodes.fill(0, firstLeaf);
  // Each upper node is the greater of its children; children past the last node count as zero.
  for (let node = FSM_UPPER_NODES_PER_PAGE - 1; node >= 0; node--) {
    nodes[node] = Math.max(nodes[2 * node + 1] ?? 0, nodes[2 * node + 2] ?? 0);
  }
}

function applyTransactionStatus(page: Buffer, payload: Buffer): void {
  const status = payload[0] ?? 0;
  for (let at = 1; at < payload.length; at += 4) {
    const index = payload.readUInt32LE(at) % TRANSACTIONS_PER_CLOG_PAGE;
    const byte = Math.floor(index / 4);
    const shift = (index % 4) * 2;
    page[byte] = ((page[byte] ?? 0) & ~(3 << shift)) | (status << shift);
  }
}

/** A group is four flag bytes, one for each of the four xids that follow them. */
function applyMultixactMembers(page: Buffer, payload: Buffer): void {
  const first = payload.readUInt32LE(0);
  for (let at = 4, member = first; at < payload.length; at += 5, member++) {
    const index = member % MULTIXACT_MEMBERS_PER_PAGE;
    const group = Math.floor(index / MEMBERS_PER_GROUP) * MEMBER_GROUP_SIZE;
    const inGroup = index % MEMBERS_PER_GROUP;
    page[group + inGroup] = payload[at + 4] ?? 0;
    page.writeUInt32LE(payload.readUInt32LE(at), group + 4 + inGroup * 4);
  }
}

/** PageInit on a page that was never written: pd_upper is zero exactly then. */
function initialiseIfNew(page: Buffer): void {
  if (page.readUInt16LE(14) !== 0) return;
  page.fill(0);
  page.writeUInt16LE(PAGE_HEADER_SIZE, 12);
  page.writeUInt16LE(PAGE_SIZE, 14);
  page.writeUInt16LE(PAGE_SIZE, 16);
  page.writeUInt16LE(PAGE_SIZE | 4, 18);
}

function u32(value: number): Buffer {
  const bytes = Buffer.alloc(4);
  bytes.writeUInt32LE(value, 0);
  return bytes;
}

function splitByPage<T>(
  subtype: number,
  entries: readonly T[],
  pageOf: (entry: T) => number,
  encode: (entries: readonly T[]) => Buffer,
): DerivedChange[] {
  // Nearly every record has one.
  if (entries.length === 1) return [{ page: pageOf(entries[0]!), subtype, payload: encode(entries) }];
  const byPage = Map.groupBy(entries, pageOf);
  return [...byPage].map(([page, onPage]) => ({ page, subtype, payload: encode(onPage) }));
}
