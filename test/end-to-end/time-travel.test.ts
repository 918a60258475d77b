/**
 * The state of a time, of a busy branch: many clients commit, roll back, prepare and pause, and note by the machine's clock when; branches made
 * of times in between have every row that was acknowledged by then and none whose commit began later. Through `strata branches create --at`.
 */
import assert from 'node:assert/strict';
import { after, before, describe, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { parseLsn } from '../../src/postgres/lsn.ts';
import { TestPlatform } from './platform.ts';

/** Of a row, in milliseconds since 1970: when its commit was sent, when it was acknowledged. */
interface Noted {
  readonly id: number;
  readonly sentMs: number;
  acknowledgedMs: number;
}

const CLIENTS = 6;
const BURST_MS = 1500;

describe('the state of a time', () => {
  let platform: TestPlatform;
  let base: string;
  const noted: Noted[] = [];
  const idleMs: number[] = [];
  let startMs = 0;
  let endMs = 0;

  before(async () => {
    platform = await TestPlatform.start();
    base = platform.connectionString;
    await platform.psql('CREATE TABLE events (id int, parent int)');
    await sleep(50);
    startMs = Date.now();
    await burst(1);
    await sleep(300);
    idleMs.push(Date.now());
    await sleep(700); // an idle gap
    await burst(2);
    endMs = Date.now() + 1;
  });
  after(() => platform?.destroy());

  async function burst(number: number): Promise<void> {
    const untilMs = Date.now() + BURST_MS;
    const client = async (n: number): Promise<void> => {
      const session = await platform.connect();
      for (let i = 0; Date.now() < untilMs; i++) {
        const id = number * 1_000_000 + n * 100_000 + i;
        await session.query(
          `BEGIN; INSERT INTO events VALUES (${id}); SAVEPOINT s; INSERT INTO events VALUES (${-id}, ${id})`,
        );
        const how = i % 5;
        if (how === 0) await session.query('ROLLBACK TO s');
        if (how === 1) {
          await session.query('ROLLBACK');
          continue;
        }
        if (how === 2) {
          await session.query(`PREPARE TRANSACTION 'p${id}'`);
          await sleep(5);
        }
        const note = { id, sentMs: Date.now(), acknowledgedMs: Infinity };
        await session.query(how === 2 ? `COMMIT PREPARED 'p${id}'` : 'COMMIT');
        note.acknowledgedMs = Date.now() + 1;
        noted.push(note);
      }
      await session.end();
    };
    await Promise.all(Array.from({ length: CLIENTS }, (_, n) => client(n)));
  }

  const text = (ms: number): string => new Date(ms).toISOString();

  async function rowsAt(ms: number, parent = 'main'): Promise<Set<number>> {
    const name = `at-${ms}-${parent}`;
    await platform.cli(['branches', 'create', '--name', name, '--at', text(ms), '--parent', parent]);
    const { stdout } = await platform.cli(['connection-string', name]);
    const ids = await platform.psql('SELECT id FROM events', stdout.trim());
    await platform.cli(['endpoints', 'suspend', name]).catch(() => {});
    return new Set(ids === '' ? [] : ids.split('\n').map(Number));
  }

  function check(rows: ReadonlySet<number>, ms: number): void {
    const known = new Map(noted.map((note) => [note.id, note]));
    for (const { id, sentMs, acknowledgedMs } of noted) {
      if (acknowledgedMs <= ms) assert(rows.has(id), `${id}, acknowledged at ${acknowledgedMs}, is there at ${ms}`);
      if (sentMs > ms) assert(!rows.has(id), `${id}, sent at ${sentMs}, is not there at ${ms}`);
      if (rows.has(id)) assert.equal(rows.has(-id), id % 5 !== 0, `subtransactions of ${id} are as they ended`);
    }
    for (const id of rows) assert(known.has(Math.abs(id)), `${id} was committed`);
  }

  test('has all that was acknowledged by then and nothing later, at moments under load and in a gap', async () => {
    assert(noted.length > 100, `${noted.length} commits are enough to be a load`);
    const moments = [0.3, 0.7].map((share) => startMs + Math.floor(BURST_MS * share));
    for (const ms of [startMs, ...moments, ...idleMs, endMs]) check(await rowsAt(ms), ms);
    assert.equal((await rowsAt(startMs - 1)).size, 0);
  });

  test('lies in the parent when it is before the branch began, over generations', async () => {
    await platform.cli(['branches', 'create', '--name', 'child']);
    const { stdout: child } = await platform.cli(['connection-string', 'child']);
    await platform.psql('INSERT INTO events VALUES (1)', child.trim());
    await platform.cli(['branches', 'create', '--name', 'grandchild', '--parent', 'child']);
    const ms = startMs + Math.floor(BURST_MS / 2);
    check(await rowsAt(ms, 'grandchild'), ms);
    const branches = await platform.cliJson<{ name: string; id: string; parent_id: string }[]>(['branches', 'list']);
    const of = (name: string) => branches.find((branch) => branch.name === name);
    assert.equal(of(`at-${ms}-grandchild`)?.parent_id, of('main')?.id);
    const now = Date.now();
    const rows = await rowsAt(now, 'grandchild');
    assert(rows.delete(1), 'what the child has committed');
    check(rows, now);
  });

  test('is found from an LSN as an LSN is from it, and outside of history is refused with the range', async () => {
    interface Point {
      readonly lsn: string;
      readonly last_commit_at: string;
      readonly branch_name: string;
    }
    const at = (...args: string[]) => platform.cliJson<Point>(['branches', 'at', ...args]);
    const gap = await at(text(idleMs[0]!));
    const last = Math.max(...noted.filter(({ acknowledgedMs }) => acknowledgedMs <= idleMs[0]!).map((n) => n.sentMs));
    const committedMs = Date.parse(gap.last_commit_at);
    assert(committedMs >= last && committedMs <= idleMs[0]!, `${gap.last_commit_at} is that of the last commit`);
    assert.deepEqual(await at(gap.lsn), gap);
    const again = await at(gap.last_commit_at);
    assert.equal(again.last_commit_at, gap.last_commit_at, 'and back');
    // Postgres writes records by itself too.
    const [before, head, after] = [await at(), await at(text(Date.now())), await at()].map(({ lsn }) => parseLsn(lsn));
    assert(before! <= head! && head! <= after!, 'a time after the last commit is the head');
    assert.equal((await at(gap.lsn, '--branch', 'grandchild')).branch_name, 'main');
    await assert.rejects(
      at('2020-01-01T00:00:00Z'),
      /2020-01-01.* before the beginning of branch main: oldest 20\d\d-/,
    );
    await assert.rejects(at('2099-01-01T00:00:00Z'), /2099-01-01.* in the future of branch main.*newest/);
    assert.equal(base, platform.connectionString);
  });
});
