import assert from 'node:assert/strict';
import { test } from 'node:test';
import { StrataError } from '../base/errors.ts';
import { TEMPLATE_LSN, World } from './fake-world.ts';

const DIRECTORY = { data_directory: '/var/lib/postgresql/17/main' };

test('an import becomes a project whose branch has no ancestor, with what the adoption found', async () => {
  await using world = new World();
  const { row, project, endpoint } = await world.control.imports.begin({ ...DIRECTORY, name: 'shop', role_name: 'me' });
  assert.equal(row.state, 'importing');
  assert.deepEqual(await world.control.imports.progress(row), { doneBytes: 500, totalBytes: 1000 });
  await world.control.operations.idle();
  const after = world.control.imports.get(row.id);
  assert.equal(after.state, 'finished');
  assert.deepEqual(JSON.parse(after.notes), [`from ${DIRECTORY.data_directory}`, 'adopted']);
  const branch = world.control.branches.defaultBranch(project.id);
  assert.deepEqual([branch.state, branch.ancestor_lsn], ['ready', TEMPLATE_LSN]);
  assert.equal(world.storage.timelines.get(branch.timeline_id)?.ancestor, undefined);
  assert.deepEqual(
    world.control.catalog.databases(branch.id).map(({ name, owner_name }) => [name, owner_name]),
    [
      ['shop', 'me'],
      ['postgres', 'me'],
    ],
  );
  assert.match(world.control.connectionUri(endpoint, 'me', 'shop'), /^postgresql:\/\/me:/);
  assert.deepEqual(world.computes.specs.get(endpoint.id)?.adoption, { ownerName: 'me' });
  const { operationIds } = world.control.endpoints.restart(project.id, endpoint.id);
  await world.control.operations.idle();
  assert.equal(operationIds.length, 2);
  assert.equal(world.computes.specs.get(endpoint.id)?.adoption, undefined, 'once is enough');
});

test('an import that storage refuses leaves no project, and says why', async () => {
  await using world = new World();
  world.storage.failures.push(new StrataError('bad-request', 'block 5 is damaged'));
  const { row, project } = await world.control.imports.begin(DIRECTORY);
  await world.control.operations.idle();
  const { state, error } = world.control.imports.get(row.id);
  assert.deepEqual([state, error], ['failed', 'block 5 is damaged']);
  assert.throws(() => world.control.projects.get(project.id), { code: 'not-found' });
  assert.equal(world.storage.timelines.size, 0);
});

test('a cluster that cannot be started is removed, unless it is to be kept', async () => {
  await using world = new World();
  for (const keep of [false, true]) {
    world.computes.startFailures.push(new StrataError('internal', 'no such locale'));
    const { row, project } = await world.control.imports.begin({ ...DIRECTORY, keep });
    await world.control.operations.idle();
    assert.match(world.control.imports.get(row.id).error ?? '', /was read, but could not be started: no such locale/);
    if (keep) assert.equal(world.control.projects.get(project.id).id, project.id);
    else assert.throws(() => world.control.projects.get(project.id), { code: 'not-found' });
  }
});

test('a restart gives up what was being read, and starts what was read', async () => {
  await using world = new World();
  const importTimeline = world.storage.importTimeline.bind(world.storage);
  world.storage.importTimeline = () => new Promise(() => {}); // the process that waits for it is gone
  const reading = await world.control.imports.begin(DIRECTORY);
  world.storage.importTimeline = importTimeline;
  await world.restart();
  await world.control.operations.idle();
  const { state, error } = world.control.imports.get(reading.row.id);
  assert.equal(state, 'failed');
  assert.match(error ?? '', /the platform stopped before the import had ended.*run it again/);
  assert.throws(() => world.control.projects.get(reading.project.id), { code: 'not-found' });

  const read = await world.control.imports.begin(DIRECTORY);
  await world.control.operations.idle();
  world.control.context.state.run(`UPDATE imports SET state = 'starting' WHERE id = ?`, read.row.id);
  world.control.context.state.run('UPDATE branches SET catalog_applied = 0');
  await world.restart();
  await world.control.operations.idle();
  assert.equal(world.control.imports.get(read.row.id).state, 'finished');
});

test('an import under way can be cancelled, one that is over cannot', async () => {
  await using world = new World();
  const { row } = await world.control.imports.begin(DIRECTORY);
  await world.control.imports.cancel(row.id);
  assert.deepEqual(world.storage.cancelled, [row.timeline_id]);
  await world.control.operations.idle();
  await assert.rejects(world.control.imports.cancel(row.id), { code: 'conflict' });
  await assert.rejects(world.control.imports.cancel('none'), { code: 'not-found' });
});
