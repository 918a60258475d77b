/**
 * Finds the running platform through its data directory and calls its API with the key kept there.
 */
import { existsSync, readFileSync } from 'node:fs';
import { join, resolve } from 'node:path';
import { API_KEY_FILE_NAME, PLATFORM_FILE_NAME, type PlatformFile } from '../api/control.ts';
import { CliError } from './errors.ts';

const REQUEST_TIMEOUT_MS = 60_000;
const DEFAULT_DATA_DIRECTORY = '.strata';

export interface RunningPlatform {
  readonly dataDirectory: string;
  readonly file: PlatformFile;
  readonly api: ApiClient;
}

/** `--data-dir`, else STRATA_DATA_DIR, else `.strata`. */
export function chooseDataDirectory(option: string | undefined, environment: NodeJS.ProcessEnv): string {
  if (option === '') throw new CliError('--data-dir "" names no directory', 2);
  return option ?? (environment['STRATA_DATA_DIR'] || DEFAULT_DATA_DIRECTORY);
}

/** Throws with what to do when the directory is not a platform's, or nothing runs there. */
export function findPlatform(directory: string): RunningPlatform {
  const dataDirectory = resolve(directory);
  if (!existsSync(dataDirectory)) {
    throw new CliError(
      `there is no data directory ${dataDirectory}: start the platform with "npm start", or name another directory with --data-dir or STRATA_DATA_DIR`,
    );
  }
  const key = readText(join(dataDirectory, API_KEY_FILE_NAME))?.trim();
  if (key === undefined || key === '') {
    throw new CliError(
      `${dataDirectory} is not the data directory of a platform (it has no ${API_KEY_FILE_NAME}): name the right one with --data-dir or STRATA_DATA_DIR`,
    );
  }
  const file = readPlatformFile(join(dataDirectory, PLATFORM_FILE_NAME));
  if (file === undefined || !isAlive(file.pid)) throw notRunning(dataDirectory);
  const origin = `http://${file.host.includes(':') ? `[${file.host}]` : file.host}:${file.httpPort}`;
  return { dataDirectory, file, api: new ApiClient(origin, key, dataDirectory) };
}

export class ApiClient {
  readonly origin: string;
  readonly #key: string;
  readonly #dataDirectory: string;

  constructor(origin: string, key: string, dataDirectory: string) {
    this.origin = origin;
    this.#key = key;
    this.#dataDirectory = dataDirectory;
  }

  get<T>(path: string, timeoutMs?: number): Promise<T> {
    return this.#call<T>('GET', path, undefined, timeoutMs);
  }

  post<T>(path: string, body?: unknown, timeoutMs?: number): Promise<T> {
    return this.#call<T>('POST', path, body, timeoutMs);
  }

  patch<T>(path: string, body: unknown): Promise<T> {
    return this.#call<T>('PATCH', path, body);
  }

  delete<T>(path: string): Promise<T> {
    return this.#call<T>('DELETE', path);
  }

  /** Whether the platform says that it is ready. */
  async isReady(): Promise<boolean> {
    const response = await this.#fetch('/health', {});
    await response.arrayBuffer();
    return response.ok;
  }

  async #call<T>(method: string, path: string, body?: unknown, timeoutMs?: number): Promise<T> {
    const init = {
      method,
      headers: {
        authorization: `Bearer ${this.#key}`,
        ...(body === undefined ? {} : { 'content-type': 'application/json' }),
      },
      ...(body === undefined ? {} : { body: JSON.stringify(body) }),
    };
    const response = await this.#fetch(`/api/v2${path}`, init, timeoutMs);
    const answer = (await response.json().catch(() => undefined)) as T | undefined;
    if (response.ok && answer !== undefined) return answer;
    const { message } = (answer ?? {}) as { message?: string };
    if (response.status === 401) {
      const advice = 'is another platform listening on its port?';
      throw new CliError(`the platform at ${this.origin} does not know the key in ${this.#dataDirectory}: ${advice}`);
    }
    throw new CliError(message ?? `${this.origin} answered ${response.status} without a reason`);
  }

  async #fetch(path: string, init: RequestInit, timeoutMs = REQUEST_TIMEOUT_MS): Promise<Response> {
    try {
      return await fetch(`${this.origin}${path}`, { ...init, signal: AbortSignal.timeout(timeoutMs) });
    } catch (error) {
      if (error instanceof Error && error.name === 'TimeoutError') {
        throw new CliError(`${this.origin} did not answer within ${timeoutMs / 1000} s`, 1, { cause: error });
      }
      throw notRunning(this.#dataDirectory, error);
    }
  }
}

function notRunning(dataDirectory: string, cause?: unknown): CliError {
  const start = `start it with "npm start -- --data-dir ${dataDirectory}"`;
  return new CliError(`the platform of ${dataDirectory} is not running: ${start}`, 1, { cause });
}

function readText(path: string): string | undefined {
  try {
    return readFileSync(path, 'utf8');
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    if (code === 'ENOENT' || code === 'ENOTDIR') return undefined;
    throw new CliError(`${path} cannot be read (${code ?? 'unknown error'})`, 1, { cause: error });
  }
}

function readPlatformFile(path: string): PlatformFile | undefined {
  const text = readText(path);
  if (text === undefined) return undefined;
  try {
    return JSON.parse(text) as PlatformFile;
  } catch (error) {
    throw new CliError(`${path} is not valid JSON: restart the platform, which writes it anew`, 1, { cause: error });
  }
}

function isAlive(pid: number): boolean {
  try {
    process.kill(pid, 0);
    return true;
  } catch (error) {
    return (error as NodeJS.ErrnoException).code === 'EPERM';
  }
}
