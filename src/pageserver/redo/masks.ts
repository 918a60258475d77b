/**
 * Masks: they overwrite, in a copy of a page, what may lawfully differ between the page on the primary
 * and the page that replay makes. Two pages agree when they are equal after the same mask.
 *
 * The page header's fields that are masked (bufpage.h): 0 pd_lsn (8 bytes), 8 pd_checksum, 10 pd_flags, 12 pd_lower, 14 pd_upper,
 * 16 pd_special, 20 pd_prune_xid. Line pointers of 4 bytes follow from byte 24: offset 15 bits, flags 2 bits, length 15 bits.
 *
 * The masks of index access methods stand beside their redo and are made of the pieces here. All are the same in 15, 16, 17 and 18.
 * Sources: bufmask.c, heap_mask, seq_mask.
 */

const PAGE_SIZE = 8192;
const PAGE_HEADER_SIZE = 24;
export const MASK_MARKER = 0;

const PD_HAS_FREE_LINES = 0x0001;
const PD_PAGE_FULL = 0x0002;
const PD_ALL_VISIBLE = 0x0004;

/** What a mask throws when a page's own pointers make no sense, so that nothing can be compared. */
export class MaskError extends Error {
  override readonly name = 'MaskError';
}

export function maskPageLsnAndChecksum(page: Buffer): void {
  page.fill(MASK_MARKER, 0, 10);
}

/** pd_prune_xid and the flags of pd_flags that are hints, or that replay may set at another time. */
export function maskPageHintBits(page: Buffer): void {
  page.fill(MASK_MARKER, 20, 24);
  page[10] = page[10]! & ~(PD_HAS_FREE_LINES | PD_PAGE_FULL | PD_ALL_VISIBLE);
}

/** The space between pd_lower and pd_upper. */
export function maskUnusedSpace(page: Buffer): void {
  const lower = page.readUInt16LE(12);
  const upper = page.readUInt16LE(14);
  const special = page.readUInt16LE(16);
  if (lower > upper || special < upper || lower < PAGE_HEADER_SIZE || special > PAGE_SIZE) {
    throw new MaskError(`page has pd_lower ${lower}, pd_upper ${upper}, pd_special ${special}`);
  }
  page.fill(MASK_MARKER, lower, upper);
}

/** Some index access methods change the flags of line pointers without WAL: all used ones become unused. */
export function maskLpFlags(page: Buffer): void {
  const end = page.readUInt16LE(12);
  for (let at = PAGE_HEADER_SIZE; at + 4 <= end; at += 4) {
    // The flags are bits 15 and 16 of the 32.
    page[at + 1] = page[at + 1]! & 0x7f;
    page[at + 2] = page[at + 2]! & 0xfe;
  }
}

/** Everything after the page header, and pd_lower and pd_upper: for deleted index pages. */
export function maskPageContent(page: Buffer): void {
  page.fill(MASK_MARKER, PAGE_HEADER_SIZE);
  page.fill(MASK_MARKER, 12, 16);
}

const ITEM_NORMAL = 1;

const HEAP_XMIN_FROZEN = 0x0300;
const HEAP_XMAX_HINTS = 0x0c00;
const HEAP_XACT_MASK = 0xfff0;
const SPECULATIVE_TOKEN_OFFSET = 0xfffe;

/** heap_mask. It serves for the maps of a heap too: on a visibility-map page it masks all that follows the header. */
export function maskHeap(page: Buffer, blk: number): void {
  maskPageLsnAndChecksum(page);
  maskPageHintBits(page);
  maskUnusedSpace(page);
  const lower = page.readUInt16LE(12);
  for (let pointerAt = PAGE_HEADER_SIZE, item = 1; pointerAt + 4 <= lower; pointerAt += 4, item++) {
    const pointer = page.readUInt32LE(pointerAt);
    const at = pointer & 0x7fff;
    const flags = (pointer >>> 15) & 3;
    const length = pointer >>> 17;
    if (at + length > PAGE_SIZE) throw new MaskError(`item ${item} of ${length} bytes at ${at} leaves the page`);
    if (flags === ITEM_NORMAL && length >= 23) maskHeapTuple(page, at, blk, item);
    // The bytes that align the next tuple are whatever was there.
    if (length > 0) page.fill(MASK_MARKER, at + length, Math.min((at + length + 7) & ~7, PAGE_SIZE));
  }
}

/** Hint bits can be set without WAL; the command id is not replayed; nor is the token of a speculative insertion. */
function maskHeapTuple(page: Buffer, at: number, blk: number, item: number): void {
  const infomask = page.readUInt16LE(at + 20);
  const frozen = (infomask & HEAP_XMIN_FROZEN) === HEAP_XMIN_FROZEN;
  page.writeUInt16LE(infomask & ~(frozen ? HEAP_XMAX_HINTS : HEAP_XACT_MASK) & 0xffff, at + 20);
  page.writeUInt32LE(MASK_MARKER, at + 8);
  if (page.readUInt16LE(at + 16) === SPECULATIVE_TOKEN_OFFSET) {
    page.writeUInt16LE(blk >>> 16, at + 12);
    page.writeUInt16LE(blk & 0xffff, at + 14);
    page.writeUInt16LE(item, at + 16);
  }
}

/** seq_mask. */
export function maskSequence(page: Buffer): void {
  maskPageLsnAndChecksum(page);
  maskUnusedSpace(page);
}
