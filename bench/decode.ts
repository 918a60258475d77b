/**
 * How fast is WAL cut into records, decoded and checked? From memory: page headers, CRC of every record, block references. The floor is
 * the CRC of the same bytes. Time is that of the processor, so that what else the machine does counts less.
 */
import { crc32c } from '../src/base/crc32c.ts';
import { WalError } from '../src/postgres/wal/error.ts';
import { WalReader } from '../src/postgres/wal/reader.ts';
import { cpuSeconds, median, type Row } from './measure.ts';
import { benchedWal, type BenchedWal } from './wal.ts';

const CHUNK_BYTES = 1024 * 1024;

export async function decode({ quick }: { readonly quick: boolean }): Promise<Row[]> {
  const rows: Row[] = [];
  for (const images of [false, true]) {
    const wal = await benchedWal({ transactions: quick ? 50_000 : 200_000, images });
    const what = images ? 'with full page images' : 'of small records';
    rows.push(...measure(wal, what, quick ? 5 : 15));
  }
  return rows;
}

function measure(wal: BenchedWal, what: string, rounds: number): Row[] {
  const { bytes, records } = readAll(wal); // Once to warm up, and to know where it ends.
  const speeds: number[] = [];
  const floors: number[] = [];
  for (let round = 0; round < rounds; round++) {
    speeds.push(bytes / 1e6 / cpuSeconds(() => readAll(wal)));
    floors.push(bytes / 1e6 / cpuSeconds(() => crc32c(wal.bytes, 0, bytes)));
  }
  const speed = median(speeds);
  const note = `${(bytes / 1e6).toFixed(0)} MB, ${Math.round(bytes / records)} bytes a record; CRC alone ${median(floors).toFixed(0)} MB/s`;
  return [
    { question: `decode WAL ${what}`, unit: 'MB/s', vanilla: undefined, strata: speed, isRate: true, note },
    {
      question: `decode WAL ${what}`,
      unit: 'records/s',
      vanilla: undefined,
      strata: (speed * 1e6 * records) / bytes,
      isRate: true,
    },
  ];
}

/** How many bytes the records take, and how many they are. */
function readAll({ startLsn, version, bytes }: BenchedWal): { bytes: number; records: number } {
  const reader = new WalReader(startLsn, version);
  let records = 0;
  try {
    for (let at = 0; at < bytes.length; at += CHUNK_BYTES) {
      reader.push(startLsn + at, bytes.subarray(at, at + CHUNK_BYTES));
      while (reader.next() !== undefined) records++;
    }
  } catch (error) {
    if (!(error instanceof WalError)) throw error; // The end: zeroes.
  }
  return { bytes: reader.position - startLsn, records };
}
