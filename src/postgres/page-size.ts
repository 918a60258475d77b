/** Size of a page of a relation or SLRU (BLCKSZ). Builds with another size are refused when their control file is read. */
export const BLOCK_SIZE = 8192;
