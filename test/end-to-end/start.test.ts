/**
 * Starting: clear errors before anything is started, a health answer, and the command line against a running platform.
 */
import assert from 'node:assert/strict';
import { execFile } from 'node:child_process';
import { chmodSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { createServer } from 'node:net';
import { tmpdir } from 'node:os';
import { dirname, join, resolve } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { promisify } from 'node:util';
import { freePort } from '../../src/base/free-port.ts';
import { TestPlatform } from './platform.ts';

const executable = resolve(import.meta.dirname, '../../bin/strata');
const run = promisify(execFile);

/** What `strata start` says when it refuses; asserts that it does. */
async function refusal(args: readonly string[], env: NodeJS.ProcessEnv = process.env): Promise<string> {
  try {
    await run(executable, ['start', ...args], { timeout: 30_000, env });
  } catch (error) {
    const { code, stderr, stdout } = error as { code: number; stderr: string; stdout: string };
    assert([1, 2].includes(code), `exit code ${code}: ${stderr}${stdout}`);
    assert(!/^\s+at /m.test(stderr), `a stack trace is no message: ${stderr}`);
    return stderr;
  }
  throw new Error('it started');
}

describe('a running platform', () => {
  let platform: TestPlatform;

  before(async () => {
    platform = await TestPlatform.start();
  });
  after(async () => {
    await platform.destroy();
  });

  test('prints the connection string, the address of the API, and ready, one line each', () => {
    const lines = platform.output.trim().split('\n').slice(-3);
    assert.match(lines[0] ?? '', /postgresql:\/\/.+@.+:\d+\/.+/);
    assert.match(lines[1] ?? '', new RegExp(`http://127\\.0\\.0\\.1:${platform.httpPort}`));
    assert.equal(lines[2], 'ready');
  });

  test('answers on /health, and asks for a key on the API', async () => {
    const base = `http://127.0.0.1:${platform.httpPort}`;
    assert.equal((await fetch(`${base}/health`)).status, 200);
    assert.equal((await fetch(`${base}/api/v2/projects`)).status, 401);
    assert.equal((await platform.api('GET', '/projects')).status, 200);
  });

  test('a second platform on the same data directory or ports is refused by name', async () => {
    const ports = ['--pg-port', String(await freePort()), '--http-port', String(await freePort())];
    assert.match(await refusal(['--data-dir', platform.dataDir, ...ports]), /in use/);
    const elsewhere = mkdtempSync(join(tmpdir(), 'strata-test-'));
    const taken = await refusal(['--data-dir', elsewhere, '--pg-port', String(platform.pgPort), ...ports.slice(2)]);
    assert.match(taken, new RegExp(`${platform.pgPort}`));
    const byNpm = { ...process.env, npm_lifecycle_event: 'start' };
    assert.match(await refusal(['--data-dir', platform.dataDir, ...ports], byNpm), /in use/);
    rmSync(elsewhere, { recursive: true });
  });

  test('projects are created, used and deleted from the command line', async () => {
    const created = await platform.cliJson<{ project: { id: string } }>(['projects', 'create', '--name', 'second']);
    const uri = (await platform.cli(['connection-string', '--project', created.project.id])).stdout.trim();
    assert.equal(await platform.psql('SELECT 1', uri), '1');
    const names = (await platform.cliJson<{ name: string }[]>(['projects', 'list'])).map((project) => project.name);
    assert(names.includes('second'));
    await platform.cli(['projects', 'delete', created.project.id]);
    await assert.rejects(platform.psql('SELECT 1', uri));
  });

  test('status shows what runs, in text and as JSON', async () => {
    assert.match((await platform.cli(['status'])).stdout, /pageserver/);
    assert.match((await platform.cli(['status'])).stdout, /WAL +\d+ logs?: .* on each safekeeper, .* not in pages/);
    const { wal } = await platform.cliJson<{ wal: { branch: string | null; state: string; kept_size: number }[] }>([
      'status',
    ]);
    const main = wal.find(({ branch }) => branch === 'first/main');
    assert.equal(main?.state, 'ok');
    assert(main.kept_size > 0);
  });

  test('psql runs from the command line', async () => {
    const { stdout } = await platform.cli(['psql', '--', '-X', '-A', '-t', '-c', 'SELECT 6 * 7']);
    assert.equal(stdout.trim(), '42');
  });
});

describe('starting is refused with the next step', () => {
  test('without a C compiler', async () => {
    const dataDir = mkdtempSync(join(tmpdir(), 'strata-test-'));
    const bin = mkdtempSync(join(tmpdir(), 'strata-bin-'));
    for (const tool of ['sh', 'dirname', 'readlink'])
      writeFileSync(join(bin, tool), `#!/bin/sh\nexec /usr/bin/${tool} "$@"\n`, { mode: 0o755 });
    writeFileSync(join(bin, 'sh'), '#!/bin/sh\nexec /bin/sh "$@"\n', { mode: 0o755 });
    const said = await refusal(['--data-dir', dataDir], { ...process.env, PATH: bin });
    assert.match(said, /C compiler/);
    rmSync(dataDir, { recursive: true });
    rmSync(bin, { recursive: true });
  });

  test('on a port in use, named', async () => {
    const server = createServer();
    await new Promise<void>((done) => server.listen(0, '127.0.0.1', done));
    const address = server.address();
    assert(typeof address === 'object' && address !== null);
    const dataDir = mkdtempSync(join(tmpdir(), 'strata-test-'));
    const said = await refusal([
      '--data-dir',
      dataDir,
      '--http-port',
      String(address.port),
      '--pg-port',
      String(await freePort()),
    ]);
    assert.match(said, new RegExp(`${address.port}.*--http-port`));
    server.close();
    rmSync(dataDir, { recursive: true });
  });

  test('on a port that one of its own services has, when others are still starting', async () => {
    const platform = await TestPlatform.start();
    await platform.stop();
    const kept = JSON.parse(readFileSync(join(platform.dataDir, 'ports.json'), 'utf8')) as { ports: number[] };
    const [pageserverPort] = kept.ports;
    const ports = ['--pg-port', String(platform.pgPort), '--http-port', String(pageserverPort)];
    const said = await refusal(['--data-dir', platform.dataDir, ...ports]);
    assert.match(said, new RegExp(`port ${pageserverPort} is in use: choose another with --http-port`));
    await platform.destroy();
  });

  test('with a data directory that cannot be made, a version without binaries, and nonsense values', async () => {
    const file = join(mkdtempSync(join(tmpdir(), 'strata-test-')), 'file');
    writeFileSync(file, '');
    assert.match(await refusal(['--data-dir', join(file, 'below')]), /below.*--data-dir/s);
    assert.match(await refusal(['--data-dir', '/proc/below']), /below.*--data-dir/s);
    const dataDir = mkdtempSync(join(tmpdir(), 'strata-test-'));
    const elsewhere = ['--pg-version', '16', '--pg-bin-dir', dirname(process.execPath)];
    assert.match(await refusal(['--data-dir', dataDir, ...elsewhere]), /postgres.*--pg-bin-dir/);
    assert.match(await refusal(['--data-dir', dataDir, '--pg-version', '9']), /9/);
    assert.match(await refusal(['--data-dir', dataDir, '--pg-port', 'many']), /many/);
    assert.match(await refusal(['--data-dir', dataDir, '--safekeepers', '0']), /0/);
    rmSync(dataDir, { recursive: true });
  });

  test('the platform starts below a folder that only root may enter', { skip: process.geteuid?.() !== 0 }, async () => {
    const closed = mkdtempSync(join(tmpdir(), 'strata-closed-'));
    chmodSync(closed, 0o700);
    mkdirSync(join(closed, 'data'));
    const platform = await TestPlatform.start({ dataDir: join(closed, 'data') });
    assert.equal(await platform.psql('SELECT 1'), '1');
    await platform.destroy();
    rmSync(closed, { recursive: true });
  });
});
