import assert from 'node:assert/strict';
import { mkdirSync, mkdtempSync, rmSync, unlinkSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'node:test';
import type { FastifyInstance } from 'fastify';
import { World } from '../control/fake-world.ts';
import { createApiServer } from '../control/server.ts';
import { parsePoint } from './point.ts';
import { psqlEnvironment } from './connect.ts';
import { formatAgo, formatBytes, formatDuration, formatTable } from './format.ts';
import { runCli } from './program.ts';
import type { PlatformFile } from '../api/control.ts';
import type { WalLag } from '../api/wal-status.ts';
import type { StartOptions } from './start.ts';

interface Program {
  readonly name: string;
  readonly programArguments: readonly string[];
  readonly environment: NodeJS.ProcessEnv;
}

/** Commands as a person would type them, without a platform. */
class Terminal {
  readonly environment: NodeJS.ProcessEnv = {};
  readonly programs: Program[] = [];
  started: StartOptions | undefined;
  programExitCode: number | undefined = 0;
  lags: readonly WalLag[] = [];
  silent: readonly number[] = [];

  async run(...commandLine: string[]): Promise<{ code: number; out: string; error: string }> {
    const out: string[] = [];
    const errors: string[] = [];
    const code = await runCli(commandLine, {
      version: '1.2.3',
      start: async (options) => {
        this.started = options;
      },
      walLags: async () => ({ lags: this.lags, silent: this.silent }),
      context: {
        print: (text) => out.push(text),
        printError: (text) => errors.push(text),
        environment: this.environment,
        now: Date.now,
        runProgram: async (name, programArguments, environment) => {
          this.programs.push({ name, programArguments, environment });
          return this.programExitCode;
        },
      },
    });
    return { code, out: out.join('\n'), error: errors.join('\n') };
  }

  /** The output of a command that must succeed. */
  async ok(...commandLine: string[]): Promise<string> {
    const { code, out, error } = await this.run(...commandLine);
    assert.equal(code, 0, error);
    assert.equal(error, '');
    return out;
  }

  async json<T>(...commandLine: string[]): Promise<T> {
    return JSON.parse(await this.ok(...commandLine, '--output', 'json')) as T;
  }

  /** A command that must fail with the code, and say the words. */
  async fails(code: number, words: string[], ...commandLine: string[]): Promise<void> {
    const result = await this.run(...commandLine);
    assert.equal(result.code, code, `${result.out}${result.error}`);
    assert.equal(result.out, '');
    for (const word of words) assert(result.error.includes(word), `"${result.error}" says ${word}`);
  }
}

/** A control plane behind a real HTTP server, found through its data directory. */
class RunningTerminal extends Terminal implements AsyncDisposable {
  readonly world = new World();
  readonly server: FastifyInstance = createApiServer({ control: this.world.control, isReady: () => true });

  static async open(): Promise<RunningTerminal> {
    const terminal = new RunningTerminal();
    terminal.world.nowMs = Date.now();
    await terminal.server.listen({ host: '127.0.0.1', port: 0 });
    terminal.environment['STRATA_DATA_DIR'] = terminal.world.dataDirectory;
    terminal.writePlatformFile({ pid: process.pid, httpPort: terminal.httpPort });
    return terminal;
  }

  get httpPort(): number {
    const address = this.server.server.address();
    assert(typeof address === 'object' && address !== null);
    return address.port;
  }

  writePlatformFile(
    values: Pick<PlatformFile, 'pid' | 'httpPort'> & Partial<Pick<PlatformFile, 'walLimitBytes' | 'safekeepers'>>,
  ): void {
    const file = {
      host: '127.0.0.1',
      pgPort: 55432,
      // Of the two services one listens: the API's own server.
      pageserver: { host: '127.0.0.1', port: values.httpPort },
      safekeepers: [{ host: '127.0.0.1', port: 1 }],
      startedAtMs: Date.now() - 65_000,
      version: '1.2.3',
      ...values,
    };
    writeFileSync(join(this.world.dataDirectory, 'platform.json'), JSON.stringify(file));
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.server.close();
    await this.world[Symbol.asyncDispose]();
  }
}

test('a platform that is not there, or not running, is said with what to do', async () => {
  const directory = mkdtempSync(join(tmpdir(), 'strata-cli-'));
  const terminal = new Terminal();
  await terminal.fails(
    1,
    ['no data directory', join(directory, 'none'), 'npm start'],
    'status',
    '--data-dir',
    join(directory, 'none'),
  );
  terminal.environment['STRATA_DATA_DIR'] = directory;
  await terminal.fails(1, ['not the data directory of a platform', '--data-dir'], 'status');
  writeFileSync(join(directory, 'api-key'), 'key\n');
  await terminal.fails(1, ['not running', 'npm start'], 'projects', 'list');
  rmSync(directory, { recursive: true });

  await using running = await RunningTerminal.open();
  running.writePlatformFile({ pid: 2 ** 22 + 1, httpPort: 1 }); // Above the largest pid: nobody's.
  await running.fails(1, ['not running'], 'status');
  running.writePlatformFile({ pid: process.pid, httpPort: 1 });
  await running.fails(1, ['not running'], 'status');
});

test('a key that the platform does not know is said, and never printed', async () => {
  await using terminal = await RunningTerminal.open();
  writeFileSync(join(terminal.world.dataDirectory, 'api-key'), 'strata_wrong\n');
  const { code, error } = await terminal.run('projects', 'list');
  assert.equal(code, 1);
  assert.match(error, /does not know the key/);
  assert(!error.includes('strata_wrong'));
  unlinkSync(join(terminal.world.dataDirectory, 'api-key'));
  await terminal.fails(1, ['no api-key'], 'projects', 'list');
});

test('status shows how much WAL waits, of how much may', async () => {
  await using terminal = await RunningTerminal.open();
  const GB = 1024 ** 3;
  const lag = {
    timelineId: 'a'.repeat(32),
    commitLsn: 10 * GB,
    notInPagesBytes: 0,
    notUploadedBytes: 1.2 * GB,
    notOffloadedBytes: 0,
    keptBytes: 1.5 * GB,
    isOffloadFailing: false,
    failures: [],
    damaged: [],
  };
  const text = async (): Promise<string> => terminal.ok('status');
  terminal.lags = [lag];
  assert.match(
    await text(),
    /1 log: up to 1.50 GB on each safekeeper, .* yet; pages of 1.20 GB of 16 GB to be uploaded/,
  );
  assert.doesNotMatch(await text(), /slowed/);
  terminal.writePlatformFile({ pid: process.pid, httpPort: terminal.httpPort, walLimitBytes: 4 * GB });
  assert.match(
    await text(),
    /is slowed: 0 B of 4 GB not in pages, 1.20 GB of 4 GB whose pages are not uploaded, 1.50 GB/,
  );
  terminal.lags = [lag, { ...lag, timelineId: 'b'.repeat(32), notUploadedBytes: 4 * GB }];
  assert.match(await text(), /the branch with most has pages of 4 GB of 4 GB to be uploaded/);
  assert.match(await text(), /b{32} is stopped/);
  const status = await terminal.json<{ wal_limit_size: number; wal: { state: string }[] }>('status');
  assert.deepEqual([status.wal_limit_size, status.wal.map(({ state }) => state)], [4 * GB, ['slowed', 'stopped']]);
});

test('status shows a damaged log, how, and what to do', async () => {
  await using terminal = await RunningTerminal.open();
  const timelineId = 'a'.repeat(32);
  const sizes = { commitLsn: 10, notOffloadedBytes: 0, keptBytes: 10, isOffloadFailing: false };
  terminal.lags = [{ timelineId, ...sizes, failures: [], damaged: [{ safekeeper: 4, reason: 'a wrong CRC' }] }];
  const safekeepers = [1, 4, 5].map((id) => ({ id, host: '127.0.0.1', port: 1 }));
  terminal.writePlatformFile({ pid: process.pid, httpPort: terminal.httpPort, safekeepers });
  assert.match(
    await terminal.ok('status'),
    /a{32} is damaged: .*; safekeeper 4: a wrong CRC; the others heal it .* "strata safekeepers replace 4"/,
  );
  const status = await terminal.json<{ wal: { state: string; damaged: object[]; next_step: string }[] }>('status');
  assert.equal(status.wal[0]!.state, 'damaged');
  assert.deepEqual(status.wal[0]!.damaged, [{ safekeeper: 4, reason: 'a wrong CRC' }]);
  assert.match(status.wal[0]!.next_step, /safekeepers replace 4/);
  terminal.writePlatformFile({ pid: process.pid, httpPort: terminal.httpPort, safekeepers: safekeepers.slice(1, 2) });
  assert.match(await terminal.ok('status'), /too few others have it/);
});

test('status shows what runs', async () => {
  await using terminal = await RunningTerminal.open();
  await terminal.ok('projects', 'create');
  await terminal.world.control.operations.idle();
  const text = await terminal.ok('status');
  assert.match(text, /ready, up 1 minute/);
  assert.match(text, /1, 1 of them active/);
  assert.match(text, /\/fake\/object-store, 3.15 MB of 2 branches to be uploaded/);
  assert.match(text, /pageserver, safekeeper 1; not answering: safekeeper 1: commits and wakes wait for a majority/);
  const status = await terminal.json<{ ready: boolean; data_directory: string; project_count: number }>('status');
  assert.deepEqual(
    [status.ready, status.data_directory, status.project_count],
    [true, terminal.world.dataDirectory, 1],
  );
});

test('status names a safekeeper that takes connections and does not answer', async () => {
  await using terminal = await RunningTerminal.open();
  const address = { host: '127.0.0.1', port: terminal.httpPort };
  const safekeepers = [3, 4, 5].map((id) => ({ id, ...address }));
  terminal.writePlatformFile({ pid: process.pid, httpPort: terminal.httpPort, safekeepers });
  const services = async (): Promise<string> => /^services +(.*)$/m.exec(await terminal.ok('status'))![1]!;
  assert.equal(await services(), 'pageserver, safekeeper 3, safekeeper 4, safekeeper 5');
  terminal.silent = [5];
  assert.match(await services(), /; not answering: safekeeper 5$/);
  terminal.silent = [3, 5];
  assert.match(await services(), /; not answering: safekeeper 3, safekeeper 5: commits and wakes wait/);
  const status = await terminal.json<{ services: { name: string; up: boolean }[] }>('status');
  assert.deepEqual(
    status.services.filter(({ up }) => !up).map(({ name }) => name),
    ['safekeeper 3', 'safekeeper 5'],
  );
});

test('projects are created, listed and deleted, by name too', async () => {
  await using terminal = await RunningTerminal.open();
  await terminal.fails(1, ['no project', 'projects create'], 'branches', 'list');
  const text = await terminal.ok('projects', 'create', '--name', 'shop', '--role', 'alice', '--database', 'books');
  assert.match(text, /postgresql:\/\/alice:\w+@127\.0\.0\.1:55432\/books\?sslmode=require&options=endpoint%3Dep-/);
  const created = await terminal.json<{ project: { id: string } }>(
    'projects',
    'create',
    '--name',
    'other',
    '--pg-version',
    '17',
  );
  assert.match(await terminal.ok('projects', 'list'), /^ID +NAME +POSTGRES +CREATED\n/);
  assert.equal((await terminal.json<unknown[]>('projects', 'list')).length, 2);
  await terminal.fails(2, ['--project', 'shop', 'other'], 'branches', 'list');
  await terminal.fails(1, ['"none"', 'shop'], 'branches', 'list', '--project', 'none');
  await terminal.ok('branches', 'list', '--project', 'shop');
  await terminal.ok('branches', 'list', '--project', created.project.id);
  const updated = await terminal.ok('projects', 'update', 'shop', '--name', 'store', '--history', '36h');
  assert.match(updated, /^project +store\nid +[a-z0-9-]+\nhistory +36 hours$/);
  await terminal.ok('projects', 'update', 'store', '--name', 'shop');
  await terminal.fails(2, ['--name or --history'], 'projects', 'update', 'shop');
  for (const history of ['5h', '31d', '-1d', 'x', '7']) {
    await terminal.fails(2, [history, '6h to 30d'], 'projects', 'update', 'shop', `--history=${history}`);
  }
  const kept = await terminal.json<{ project: { id: string; history_retention_seconds: number } }>(
    ...['projects', 'create', '--history', '1d'],
  );
  assert.equal(kept.project.history_retention_seconds, 86_400);
  await terminal.ok('projects', 'delete', kept.project.id);
  await terminal.fails(1, ['16', 'available: 17'], 'projects', 'create', '--pg-version', '16');
  await terminal.fails(2, ['"x"'], 'projects', 'create', '--pg-version', 'x');
  assert.match(await terminal.ok('projects', 'delete', 'shop'), /deleted project shop/);
  await terminal.ok('branches', 'list');
  await terminal.ok('projects', 'create', '--name', 'other');
  await terminal.fails(2, ['"other"', created.project.id], 'projects', 'delete', 'other');
});

test('branches are created from the head, an LSN or a time of any branch, listed and deleted', async () => {
  await using terminal = await RunningTerminal.open();
  await terminal.ok('projects', 'create');
  const text = await terminal.ok('branches', 'create', '--name', 'dev');
  assert.match(text, /^branch +dev$/m);
  assert.match(text, /^parent +main at 0\/1500000$/m);
  assert.match(text, /^connection +postgresql:/m);
  await terminal.ok('branches', 'create', '--name', 'leaf', '--parent', 'dev', '--at', '0/1500000', '--no-endpoint');
  assert.match(await terminal.ok('branches', 'at'), /^lsn +0\/1500000\nlast commit +none yet\nbranch +main$/);
  await terminal.fails(2, ['the point "soon"'], 'branches', 'at', 'soon');
  await terminal.fails(1, ['F/0', 'newest'], 'branches', 'at', 'F/0', '--branch', 'dev');
  const at = new Date(Date.now() + 1).toISOString().replace('T', ' ').replace('Z', '+00');
  terminal.world.nowMs = Date.now() + 10;
  await terminal.ok('branches', 'create', '--name', 'past', '--at', at);
  const list = await terminal.ok('branches', 'list');
  assert.match(list, /^main \(default\) +br-/m);
  assert.match(list, /^leaf +br-[a-z0-9-]+ +dev +0\/1500000 +none /m);
  const branches = await terminal.json<{ name: string }[]>('branches', 'list');
  assert.deepEqual(branches.map((branch) => branch.name).toSorted(), ['dev', 'leaf', 'main', 'past']);

  await terminal.fails(1, ['"nope"', 'main, '], 'branches', 'delete', 'nope');
  await terminal.fails(1, ['"nope"', 'main, '], 'branches', 'create', '--parent', 'nope');
  await terminal.fails(1, ['"dev"', 'in use'], 'branches', 'create', '--name', 'dev');
  await terminal.fails(1, ['F/0', 'newest'], 'branches', 'create', '--at', 'F/0');
  await terminal.fails(2, ['"noon"', 'LSN'], 'branches', 'create', '--at', 'noon');
  await terminal.fails(2, ['no time zone'], 'branches', 'create', '--at', '2026-01-31 12:00:00');
  assert.match(await terminal.ok('branches', 'rename', 'past', 'gone'), /^branch past \(br-.* is gone now$/);
  await terminal.fails(1, ['"dev"', 'in use'], 'branches', 'rename', 'gone', 'dev');
  await terminal.fails(1, ['branch.name', 'control characters'], 'branches', 'rename', 'gone', 'two\nlines');
  await terminal.ok('branches', 'set-default', 'gone');
  assert.match(await terminal.ok('branches', 'list'), /^gone \(default\) +br-/m);
  await terminal.ok('branches', 'set-default', 'main');
  await terminal.fails(1, ['leaf'], 'branches', 'delete', 'dev');
  await terminal.fails(1, ['default'], 'branches', 'delete', 'main');
  assert.match(await terminal.ok('branches', 'delete', 'leaf'), /deleted branch leaf \(br-/);
});

test('endpoints are started and suspended by id or branch, and the command waits', async () => {
  await using terminal = await RunningTerminal.open();
  await terminal.ok('projects', 'create');
  await terminal.ok('branches', 'create', '--name', 'dev');
  await terminal.ok('branches', 'create', '--name', 'bare', '--no-endpoint');
  assert.match(await terminal.ok('endpoints', 'start', 'dev'), /^endpoint ep-[a-z0-9-]+ is active$/);
  assert.match(await terminal.ok('endpoints', 'start', 'dev'), /active already$/);
  const endpoints = await terminal.json<{ id: string; current_state: string }[]>('endpoints', 'list');
  assert.deepEqual(
    endpoints.map((endpoint) => endpoint.current_state),
    ['active', 'active'],
  );
  assert.match(await terminal.ok('endpoints', 'suspend', endpoints[0]!.id), / is idle$/);
  const list = await terminal.ok('endpoints', 'list');
  for (const state of ['active', 'idle']) {
    assert.match(list, new RegExp(` (dev|main) +read-write +${state} +(just now|\\d+ seconds? ago)$`, 'm'));
  }
  await terminal.fails(1, ['bare', 'no endpoint'], 'endpoints', 'start', 'bare');
  await terminal.fails(1, ['"ep-x"', endpoints[0]!.id], 'endpoints', 'start', 'ep-x');
  await terminal.ok('endpoints', 'suspend');
  terminal.world.computes.startFailures.push(new Error('no room for Postgres'));
  await terminal.fails(1, ['no room for Postgres'], 'endpoints', 'start');
});

test('changes are of a branch since it began, or of two since they parted, by numbers where nobody is awake', async () => {
  await using terminal = await RunningTerminal.open();
  await terminal.ok('projects', 'create');
  const timelineOf = async (name: string): Promise<string> =>
    (await terminal.json<{ name: string; timeline_id: string }[]>('branches', 'list')).find(
      (branch) => branch.name === name,
    )!.timeline_id;
  const { storage } = terminal.world;
  storage.commit(await timelineOf('main'), Date.now() * 1000);
  await terminal.ok('branches', 'create', '--name', 'dev');
  const before = ['--parent', 'dev', '--at', '0/1500000', '--no-endpoint'];
  assert.match(await terminal.ok('branches', 'create', '--name', 'old', ...before), /^parent +main at 0\/1500000$/m);
  await terminal.ok('endpoints', 'suspend', 'main');
  await terminal.ok('endpoints', 'suspend', 'dev');
  const nothing = await terminal.ok('branches', 'changes', 'dev', '--no-wake');
  assert.match(nothing, /^dev, from (\S+) to \1: 0 pages, 0 B\nnothing changed$/);
  storage.commit(await timelineOf('dev'), Date.now() * 1000);
  const dev = await terminal.ok('branches', 'changes', 'dev', '--no-wake');
  assert.match(dev, /^16383 +file 16384 +1 +8.19 kB +1 +- +- +- +grown from 0 to 1 pages$/m);
  const sides = await terminal.json<{ branch: string; from_lsn: string; pages: number }[]>(
    ...['branches', 'changes', 'dev', 'main', '--no-wake'],
  );
  assert.deepEqual(
    sides.map(({ branch, pages }) => [branch, pages]),
    [
      ['dev', 1],
      ['main', 0],
    ],
  );
  assert.equal(sides[0]!.from_lsn, sides[1]!.from_lsn);
  await terminal.fails(2, ['--from "x"', 'neither an LSN'], 'branches', 'changes', 'dev', '--from', 'x');
  await terminal.fails(1, ['2001-', 'before'], 'branches', 'changes', 'dev', '--to', '2001-01-31 12:00:00Z');
  await terminal.fails(
    2,
    ['--to', 'two branches'],
    'branches',
    'changes',
    'dev',
    'main',
    '--to',
    '2026-01-31T12:00:00Z',
  );
  await terminal.fails(1, ['FFFF/0', 'in the future'], 'branches', 'changes', 'dev', '--from', 'FFFF/0');
});

test('help says of no flag that it is off, and where what is for psql comes', async () => {
  const terminal = new Terminal();
  for (const command of [['import'], ['branches', 'changes'], ['start']]) {
    assert.doesNotMatch(await terminal.ok(...command, '--help'), /default:\s+false/);
  }
  await terminal.fails(2, ["unknown option '-c'", "strata psql main -- -c 'SELECT 1'"], 'psql', '-c', 'SELECT 1');
});

test('a connection string is for the default branch or a named one', async () => {
  await using terminal = await RunningTerminal.open();
  await terminal.ok('projects', 'create');
  await terminal.ok('branches', 'create', '--name', 'dev');
  const main = await terminal.ok('connection-string');
  const dev = await terminal.json<{ connection_uri: string }>('connection-string', 'dev');
  assert.notEqual(main, dev.connection_uri);
  assert.match(
    main,
    /^postgresql:\/\/stratadb_owner:\w+@127\.0\.0\.1:55432\/stratadb\?sslmode=require&options=endpoint%3Dep-[a-z0-9-]+$/,
  );
  await terminal.fails(1, ['"bob"', 'stratadb_owner'], 'connection-string', '--role', 'bob');
  await terminal.fails(1, ['"nope"', 'made with SQL'], 'connection-string', '--database', 'nope');
});

test('psql gets its arguments, and the password through the environment only', async () => {
  await using terminal = await RunningTerminal.open();
  await terminal.ok('projects', 'create');
  await terminal.ok('branches', 'create', '--name', 'dev');
  const uri = new URL(await terminal.ok('connection-string', 'dev'));
  await terminal.ok('psql', 'dev', '--', '-c', 'SELECT 1', '--', 'x');
  const [call] = terminal.programs;
  assert.equal(call!.name, 'psql');
  assert.deepEqual(call!.programArguments, ['-c', 'SELECT 1', '--', 'x']);
  assert.equal(call!.environment['PGPASSWORD'], uri.password);
  assert.equal(call!.environment['PGOPTIONS'], uri.searchParams.get('options'));
  assert.equal(call!.environment['PGPORT'], '55432');

  await terminal.ok('psql', '--', '-l');
  assert.deepEqual(terminal.programs[1]!.programArguments, ['-l']);
  terminal.programExitCode = 3;
  assert.equal((await terminal.run('psql')).code, 3);
  terminal.programExitCode = undefined;
  await terminal.fails(1, ['not on PATH', 'connection-string'], 'psql');
  await terminal.fails(2, ['only psql'], 'status', '--', 'x');
});

test('a real psql is found on PATH', { skip: process.platform === 'win32' }, async () => {
  await using terminal = await RunningTerminal.open();
  await terminal.ok('projects', 'create');
  const folder = join(terminal.world.dataDirectory, 'bin');
  mkdirSync(folder);
  writeFileSync(join(folder, 'psql'), '#!/bin/sh\n[ "$1" = -c ] && [ -n "$PGPASSWORD" ] && exit 7\n', { mode: 0o755 });
  const before = { path: process.env['PATH'], data: process.env['STRATA_DATA_DIR'] };
  process.env['PATH'] = `${folder}:${before.path ?? ''}`;
  process.env['STRATA_DATA_DIR'] = terminal.world.dataDirectory;
  try {
    assert.equal(await runCli(['psql', '--', '-c', 'x'], { version: '1', start: async () => {} }), 7);
  } finally {
    process.env['PATH'] = before.path;
    if (before.data === undefined) delete process.env['STRATA_DATA_DIR'];
    else process.env['STRATA_DATA_DIR'] = before.data;
  }
});

test('start has the documented defaults and checks what it is given', async () => {
  const terminal = new Terminal();
  await terminal.ok('start');
  assert.deepEqual(terminal.started, {
    dataDir: '.strata',
    pgPort: 55432,
    httpPort: 55480,
    pgVersion: undefined,
    pgBinDir: undefined,
    suspendTimeoutSeconds: 300,
    refillObjectStore: false,
  });
  await terminal.ok(
    'start',
    '--data-dir',
    '/d',
    '--pg-port',
    '1',
    '--http-port',
    '2',
    '--safekeepers',
    '1',
    '--pg-version',
    '16',
    '--pg-bin-dir',
    '/b',
    '--suspend-timeout',
    '-1',
    '--refill-object-store',
  );
  assert.deepEqual(Object.values(terminal.started), ['/d', 1, 2, 1, 16, '/b', -1, true]);
  await terminal.fails(2, ['--pg-port', 'x'], 'start', '--pg-port', 'x');
  await terminal.fails(2, ['both 55480', 'two ports'], 'start', '--pg-port', '55480');
  await terminal.fails(2, ['--data-dir ""'], 'start', '--data-dir', '');
  await terminal.fails(2, ['--object-store', 'empty'], 'start', '--object-store', '');
  await terminal.fails(2, ['1, 3, 5, 7'], 'start', '--safekeepers', '2');
  await terminal.fails(2, ['65535'], 'start', '--http-port', '65536');
  await terminal.fails(2, ['15, 16, 17, 18'], 'start', '--pg-version', '14');
  await terminal.fails(2, ['--suspend-timeout', '-1 for never'], 'start', '--suspend-timeout', '0');
  await terminal.fails(2, ['--suspend-timeout', 'from -1'], 'start', '--suspend-timeout', '-2');
  await terminal.fails(2, ['--pg-port', 'whole number'], 'start', '--pg-port', '1e3');
  await terminal.fails(2, ['--frobnicate'], 'start', '--frobnicate');
  await terminal.ok('start', '--wal-limit', '4GB', '--cache-size', '500 mb');
  const started: StartOptions | undefined = terminal.started;
  assert.deepEqual([started?.walLimitBytes, started?.cacheBytes], [4 * 1024 ** 3, 500 * 1024 ** 2]);
  await terminal.fails(2, ["'4'", 'with a unit'], 'start', '--wal-limit', '4');
  await terminal.fails(2, ['512MB', 'at least 1GB'], 'start', '--wal-limit', '512MB');
  await terminal.fails(2, ['9999999999TB', 'more than any disk'], 'start', '--wal-limit', '9999999999TB');
});

test('safekeepers that are named wrongly or twice are told before anything is asked for', async () => {
  const terminal = new Terminal();
  for (const verb of ['replace', 'remove', 'rebuild']) {
    await terminal.fails(2, ['"1x" is not the id'], 'safekeepers', verb, '1x');
    await terminal.fails(2, ['safekeeper 2 is named twice'], 'safekeepers', verb, '2', '3', '2');
  }
  await terminal.fails(2, ['--count', '1 to 99'], 'safekeepers', 'add', '--count', '-2');
});

test('errors of starting are shown by their message, with the stack only for bugs', async () => {
  const errors: string[] = [];
  const context = {
    print: () => {},
    printError: (text: string) => errors.push(text),
    environment: {},
    now: Date.now,
    runProgram: async () => 0,
  };
  const failWith = (error: Error) => runCli(['start'], { version: '1', context, start: () => Promise.reject(error) });
  assert.equal(await failWith(Object.assign(new Error('port 1 is in use'), { code: 'conflict' })), 1);
  assert.deepEqual(errors, ['strata: port 1 is in use']);
  assert.equal(await failWith(new TypeError('undefined is not a function')), 1);
  assert.match(errors.at(-1)!, /at /);
});

test('every command has help with an example, and wrong ones point to it', async () => {
  const terminal = new Terminal();
  const commands = [
    [],
    ['start'],
    ['status'],
    ['projects'],
    ['projects', 'create'],
    ['projects', 'list'],
    ['projects', 'delete'],
    ['branches'],
    ['branches', 'create'],
    ['branches', 'list'],
    ['branches', 'delete'],
    ['endpoints'],
    ['endpoints', 'list'],
    ['endpoints', 'start'],
    ['endpoints', 'suspend'],
    ['connection-string'],
    ['psql'],
  ];
  for (const command of commands)
    assert.match(await terminal.ok(...command, '--help'), /Example:\n {2}\$ strata /, command.join(' '));
  assert.equal(await terminal.ok('--version'), '1.2.3');
  await terminal.fails(2, ['brunches', 'branches'], 'brunches');
  await terminal.fails(2, ['strata branches delete --help'], 'branches', 'delete');
  await terminal.fails(2, ['table, json'], 'status', '--output', 'xml');
  assert.equal((await terminal.run()).code, 2);
});

test('points in time are taken as the API and as Postgres write them', () => {
  assert.deepEqual(parsePoint('0/16b3748'), { parent_lsn: '0/16b3748' });
  const time = (text: string) => parsePoint(text);
  assert.deepEqual(time('2026-01-31T12:00:00.5Z'), { parent_timestamp: '2026-01-31T12:00:00.5Z' });
  assert.deepEqual(time('2026-01-31 12:00:00.123456+00'), { parent_timestamp: '2026-01-31T12:00:00.123456+00:00' });
  assert.deepEqual(time('2026-01-31 12:00 -0330'), { parent_timestamp: '2026-01-31T12:00:00-03:30' });
  for (const wrong of ['', '0/', '123', '2026-01-31', '2026-01-31 12:00:00.1234567Z']) {
    assert.throws(() => parsePoint(wrong), /--at/, wrong);
  }
});

test('connection strings become libpq’s environment', () => {
  const environment = psqlEnvironment('postgresql://a%20b:p%40@[::1]:5/d%2Fb?sslmode=require&options=endpoint%3Dep-x');
  assert.deepEqual(environment, {
    PGHOST: '::1',
    PGPORT: '5',
    PGUSER: 'a b',
    PGPASSWORD: 'p@',
    PGDATABASE: 'd/b',
    PGSSLMODE: 'require',
    PGOPTIONS: 'endpoint=ep-x',
  });
});

test('tables line up, times are for people', () => {
  assert.equal(formatTable(['A', 'BB'], [['xxx', 'y']]), 'A    BB\nxxx  y');
  assert.deepEqual([512, 1234, 45_600_000, 999_999].map(formatBytes), ['512 B', '1.23 kB', '45.6 MB', '1.00 MB']);
  assert.equal(formatDuration(999), 'less than a second');
  assert.equal(formatDuration(61_000), '1 minute');
  assert.equal(formatDuration(2 * 24 * 3600_000 + 5), '2 days');
  assert.equal(formatAgo('1970-01-01T00:00:00Z', 7_200_000), '2 hours ago');
  assert.equal(formatAgo('1970-01-01T00:00:01Z', 0), 'just now');
  assert.equal(formatAgo(undefined, 0), '-');
});
