import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { test } from 'node:test';
import { createLog } from './log.ts';
import { setTimeout as sleep } from 'node:timers/promises';
import { findProcessors, keepTo, shareOf, SharedProcessor } from './processors.ts';

const log = createLog({ name: 'test', level: 'silent' });

test('the last of few processors is shared, and none where there is one only, or many, or nothing is known', () => {
  for (const [all, shared] of [
    ['0-1', '1'],
    ['0,2', '2'],
    ['4-5,8-9', '9'],
  ] as const) {
    assert.deepEqual(shareOf(all), { all, shared });
  }
  for (const all of ['0', '3', '0-7', '0-2,4-5', '']) assert.equal(shareOf(all), undefined, all);
});

test('a process is kept to processors, and one that is gone does no harm', async (context) => {
  const child = spawn('sleep', ['60']);
  context.after(() => child.kill());
  const { pid } = child;
  assert(pid !== undefined);
  const processors = findProcessors() ?? { all: '0', shared: '0' };
  for (const list of [processors.shared, processors.all]) {
    await keepTo(list, pid, log);
    if (processors.all === '0') continue; // Whether it may use that one is not known.
    assert.match(readFileSync(`/proc/${pid}/status`, 'latin1'), new RegExp(`^Cpus_allowed_list:\\s*${list}$`, 'm'));
  }
  await keepTo('0', 2 ** 30, log);
});

test('this process shares the processor from the first sender on until the last is gone', async (context) => {
  const found = findProcessors();
  if (found === undefined) return context.skip('there are not few processors');
  const processor = new SharedProcessor(found, log);
  const children = [spawn('sleep', ['60']), spawn('sleep', ['60'])];
  context.after(() => children.forEach((child) => child.kill()));
  const isOn = async (list: string, pid = process.pid): Promise<void> => {
    const pattern = new RegExp(`^Cpus_allowed_list:\\s*${list}$`, 'm');
    for (const deadline = Date.now() + 20_000; !pattern.test(readFileSync(`/proc/${pid}/status`, 'latin1'));) {
      assert(Date.now() < deadline, `process ${pid} does not run on ${list}`);
      await sleep(5);
    }
  };
  const [first, second] = children.map(({ pid }) => processor.keepSender(pid!));
  for (const pid of [process.pid, ...children.map((child) => child.pid)]) await isOn(found.shared, pid);
  first!();
  first!();
  await sleep(100);
  await isOn(found.shared);
  second!();
  await isOn(found.all);
});
