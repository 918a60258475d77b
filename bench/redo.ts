/**
 * How long does a page take that is made of an image and the records after it? Values as the page store keeps them: each record is decoded
 * and replayed. Chains are of real pages; where there are not enough with the length, fewer pages are asked again and again.
 */
import { replayValue } from '../src/pageserver/replay.ts';
import { recordTypeName } from '../src/pageserver/redo/record-type.ts';
import { needsPriorPage } from '../src/pageserver/redo/redo.ts';
import { encodeRecord } from '../src/pageserver/value.ts';
import { BLOCK_SIZE } from '../src/postgres/page-size.ts';
import { rmgrName } from '../src/postgres/rmgr.ts';
import type { Lsn } from '../src/postgres/lsn.ts';
import type { PgVersion } from '../src/postgres/version.ts';
import { WalError } from '../src/postgres/wal/error.ts';
import { WalReader } from '../src/postgres/wal/reader.ts';
import { cpuSeconds, median, type Row } from './measure.ts';
import { benchedWal, type BenchedWal } from './wal.ts';

interface PageChange {
  readonly type: string;
  readonly value: Buffer;
  readonly lsn: Lsn;
}

interface Chain {
  readonly image: Buffer;
  readonly changes: readonly PageChange[];
}

interface Shape {
  readonly what: string;
  readonly length: number;
  readonly types: RegExp;
}

const SHAPES: readonly Shape[] = [
  { what: '1 heap insert', length: 1, types: /^Heap\/INSERT$/ },
  { what: '10 heap inserts', length: 10, types: /^Heap\/INSERT$/ },
  { what: '100 heap inserts', length: 100, types: /^Heap\/INSERT$/ },
  { what: '1,000 heap updates and prunings', length: 1000, types: /^Heap2?\// },
  { what: '1 btree insert', length: 1, types: /^Btree\/INSERT_LEAF$/ },
  { what: '10 btree inserts', length: 10, types: /^Btree\/INSERT_LEAF$/ },
  { what: '100 btree inserts', length: 100, types: /^Btree\/INSERT_LEAF$/ },
  { what: '1,000 btree inserts and deduplications', length: 1000, types: /^Btree\// },
];
const MAX_CHAINS = 50;
const ROUNDS = 9;
const MIN_ROUND_MS = 20;

export async function redo({ quick }: { readonly quick: boolean }): Promise<Row[]> {
  const wal = await benchedWal({ transactions: quick ? 20_000 : 60_000, images: false });
  const pages = changesByPage(wal);
  return SHAPES.map((shape) => {
    const chains = findChains(pages, shape, wal.version);
    const us = median(Array.from({ length: quick ? 3 : ROUNDS }, () => microsecondsEach(chains, wal.version)));
    return {
      question: `make a page: an image and ${shape.what}`,
      unit: 'µs',
      vanilla: undefined,
      strata: us,
      isRate: false,
      note: `${Math.round(1e6 / us).toLocaleString('en-US')} pages/s; ${chains.length} different pages`,
    };
  });
}

/** Each page's changes in order, from its first one on if that one makes the page anew. */
function changesByPage({ startLsn, version, bytes }: BenchedWal): readonly (readonly PageChange[])[] {
  const pages = new Map<string, PageChange[]>();
  const reader = new WalReader(startLsn, version);
  reader.push(startLsn, bytes);
  try {
    for (let record = reader.next(); record !== undefined; record = reader.next()) {
      for (const block of record.blocks) {
        const key = `${block.spc}/${block.db}/${block.rel}/${block.fork}/${block.blk}`;
        const anew = !needsPriorPage(record, block.id);
        let changes = pages.get(key);
        if (changes === undefined || anew) {
          if (!anew) continue;
          pages.set(key, (changes = []));
        }
        changes.push({
          type: `${rmgrName(record.rmid)}/${recordTypeName(record, version)}`,
          value: Buffer.from(encodeRecord(record.bytes, record.startLsn, block.id, anew)),
          lsn: record.endLsn,
        });
      }
    }
  } catch (error) {
    if (!(error instanceof WalError)) throw error; // The end: zeroes.
  }
  return [...pages.values()];
}

function findChains(pages: readonly (readonly PageChange[])[], shape: Shape, version: PgVersion): Chain[] {
  const chains: Chain[] = [];
  for (const changes of pages) {
    let first = 1;
    for (let at = 1; at < changes.length; at++) {
      if (!shape.types.test(changes[at]!.type)) first = at + 1;
      if (at - first + 1 < shape.length) continue;
      const image = Buffer.alloc(BLOCK_SIZE);
      for (const { value, lsn } of changes.slice(0, first)) replayValue(image, value, lsn, version);
      chains.push({ image, changes: changes.slice(first, at + 1) });
      break;
    }
    if (chains.length === MAX_CHAINS) break;
  }
  if (chains.length === 0) throw new Error(`no page has ${shape.what} in a row`);
  return chains;
}

/** Of the processor. */
function microsecondsEach(chains: readonly Chain[], version: PgVersion): number {
  const page = Buffer.alloc(BLOCK_SIZE);
  let made = 0;
  const spent = cpuSeconds(() => {
    const start = performance.now();
    while (performance.now() - start < MIN_ROUND_MS) {
      for (const { image, changes } of chains) {
        image.copy(page);
        for (let i = 0; i < changes.length; i++) {
          const { value, lsn } = changes[i]!;
          replayValue(page, value, lsn, version);
        }
      }
      made += chains.length;
    }
  });
  return (spent * 1e6) / made;
}
