import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { test, type TestContext } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { StrataError } from '../base/errors.ts';
import { serveRpc } from '../base/rpc.ts';
import { signToken } from '../base/token.ts';
import type { Admission, EndpointRequest, WakeService } from './wake.ts';
import { WakeClient, wakeMethods } from './wake-rpc.ts';

const SECRET = randomBytes(32);
const REQUEST: EndpointRequest = { endpointId: 'ep-one', user: 'u', database: 'd' };

/** Answers when told to, and counts who is on the way in. */
class SlowService implements WakeService {
  entering = 0;
  readonly #answers: ((error?: StrataError) => void)[] = [];

  wake(request: EndpointRequest, signal: AbortSignal): Promise<Admission> {
    this.entering++;
    const settled = once(() => this.entering--);
    return new Promise((resolve, reject) => {
      const fail = (error: StrataError): void => {
        settled();
        reject(error);
      };
      signal.addEventListener('abort', () => fail(new StrataError('unavailable', 'gone')));
      const admission = { endpointId: request.endpointId ?? '', socketPath: '/s', settled };
      this.#answers.push((error) => (error === undefined ? resolve(admission) : fail(error)));
    });
  }

  answer(error?: StrataError): void {
    this.#answers.shift()?.(error);
  }
}

function once(work: () => void): () => void {
  let isDone = false;
  return () => {
    if (!isDone) work();
    isDone = true;
  };
}

async function serve(context: TestContext): Promise<{ service: SlowService; client: WakeClient }> {
  const service = new SlowService();
  const methods = wakeMethods(Promise.resolve(service));
  const server = await serveRpc({ host: '127.0.0.1', port: 0, secret: SECRET, methods });
  const token = await signToken(SECRET, { scope: 'platform' });
  const client = new WakeClient({ host: '127.0.0.1', port: server.port, token });
  context.after(async () => {
    await client.close();
    await server.close();
  });
  return { service, client };
}

async function until(condition: () => boolean): Promise<void> {
  for (let wait = 0; !condition(); wait++) {
    assert(wait < 500, 'it comes to be in time');
    await sleep(10);
  }
}

test('a client is entering until it says that it is in', async (context) => {
  const { service, client } = await serve(context);
  const waking = client.wake(REQUEST, new AbortController().signal);
  await until(() => service.entering === 1);
  service.answer();
  const admission = await waking;
  assert.equal(admission.socketPath, '/s');
  assert.equal(service.entering, 1);
  admission.settled();
  admission.settled();
  await until(() => service.entering === 0);
});

test('a refusal comes with its code and message', async (context) => {
  const { service, client } = await serve(context);
  const waking = client.wake(REQUEST, new AbortController().signal);
  await until(() => service.entering === 1);
  service.answer(new StrataError('not-found', 'endpoint "ep-one" does not exist'));
  await assert.rejects(waking, { code: 'not-found', message: 'endpoint "ep-one" does not exist' });
});

test('clients that leave, and those of a proxy that dies, are entering no more', async (context) => {
  const { service, client } = await serve(context);
  const leaving = new AbortController();
  const waking = client.wake(REQUEST, leaving.signal);
  await until(() => service.entering === 1);
  leaving.abort();
  await assert.rejects(waking);
  await until(() => service.entering === 0);
  const inside = client.wake(REQUEST, new AbortController().signal);
  const waiting = client.wake(REQUEST, new AbortController().signal);
  waiting.catch(() => {});
  await until(() => service.entering === 2);
  service.answer(); // of the one that has left
  service.answer();
  await inside;
  await client.close();
  await until(() => service.entering === 0);
});
