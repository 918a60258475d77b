import assert from 'node:assert/strict';
import { chmodSync, mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { after, test } from 'node:test';
import { PG_VERSIONS } from '../postgres/version.ts';
import { findInstallation, installationEnvironment, Installations } from './installation.ts';

const directory = mkdtempSync(join(tmpdir(), 'strata-installation-'));
after(() => rmSync(directory, { recursive: true, force: true }));

/** A bin folder whose postgres only says its version. */
function fakeInstallation(name: string, version: string): string {
  const binDir = join(directory, name, 'bin');
  mkdirSync(binDir, { recursive: true });
  for (const program of ['postgres', 'initdb']) {
    writeFileSync(join(binDir, program), `#!/bin/sh\necho "postgres (PostgreSQL) ${version}"\n`);
    chmodSync(join(binDir, program), 0o755);
  }
  return binDir;
}

test('every supported major comes from npm, 17 when nobody says which', () => {
  for (const pgVersion of PG_VERSIONS) {
    const installation = findInstallation({ pgVersion });
    assert.equal(installation.pgVersion, pgVersion);
    assert.match(installation.fullVersion, new RegExp(`^${pgVersion}\\.\\d+$`));
    const { LD_LIBRARY_PATH } = installationEnvironment(installation);
    assert.equal(LD_LIBRARY_PATH, join(dirname(installation.binDir), 'lib'));
  }
  assert.equal(findInstallation({}).pgVersion, 17);
});

test('a build by path has the major that it says, and no shared libraries that it does not bring', () => {
  const binDir = fakeInstallation('debian', '15.9 (Debian 15.9-1.pgdg120+1)');
  mkdirSync(join(dirname(binDir), 'lib'));
  writeFileSync(join(dirname(binDir), 'lib', 'pgoutput.so'), '');
  const installation = findInstallation({ pgBinDir: binDir });
  assert.deepEqual(installation, { binDir, pgVersion: 15, fullVersion: '15.9' });
  assert.equal(installationEnvironment(installation)['LD_LIBRARY_PATH'], undefined);
});

test('a platform offers what it was started with for that major, and npm’s of the others', () => {
  const chosen = findInstallation({ pgBinDir: fakeInstallation('sixteen', '16.1') });
  const installations = new Installations(chosen, undefined, directory);
  assert.deepEqual(installations.versions, PG_VERSIONS);
  assert.equal(installations.of(16).binDir, chosen.binDir);
  assert.equal(installations.of(18).pgVersion, 18);
});

test('what is missing, of another major or not supported is refused with what to do', () => {
  assert.throws(() => findInstallation({ pgVersion: 14 }), /Postgres 14 was asked for; Strata runs 15, 16, 17 and 18/);
  const old = fakeInstallation('old', '14.2');
  assert.throws(() => findInstallation({ pgBinDir: old }), /holds Postgres 14.2; Strata runs/);
  const fifteen = fakeInstallation('fifteen', '15.2');
  assert.throws(() => findInstallation({ pgBinDir: fifteen, pgVersion: 17 }), /17 was asked for, but .* holds 15\.2: /);
  assert.throws(() => findInstallation({ pgBinDir: directory }), /has no postgres: --pg-bin-dir must name/);
});
