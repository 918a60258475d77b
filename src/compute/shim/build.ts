/**
 * Compiles the page shim, the only native code of the project, with whatever C compiler the machine has.
 *
 * The library's name carries a hash of its sources and of how it was compiled, so a changed source is another file, and a file that is there
 * is never compiled again nor overwritten under a Postgres that has it loaded.
 */
import { execFile } from 'node:child_process';
import { createHash, randomUUID } from 'node:crypto';
import { chmodSync, existsSync, mkdirSync, readdirSync, readFileSync, renameSync, rmSync } from 'node:fs';
import { arch } from 'node:os';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { StrataError } from '../../base/errors.ts';

const SOURCE_DIRECTORY = import.meta.dirname;
const COMPILERS = ['cc', 'gcc', 'clang'];
const FLAGS = ['-std=gnu11', '-O2', '-fPIC', '-shared', '-fvisibility=hidden', '-Wall', '-Wextra', '-Werror'];
/** With fortified headers `read` and others would be inline functions, which cannot be defined anew. */
const UNFORTIFIED = ['-U_FORTIFY_SOURCE'];
const COMPILE_TIMEOUT_MS = 120_000;

export interface BuildShimOptions {
  /** Tried before `cc`, `gcc` and `clang`; by default the environment's CC. */
  readonly compiler?: string | undefined;
}

/**
 * The path of the shim in `directory`, compiled first when it is not there. Throws `bad-request` when the machine has no C compiler, and
 * `internal` with the compiler's words when it fails.
 */
export async function buildShim(directory: string, options: BuildShimOptions = {}): Promise<string> {
  const sources = readdirSync(SOURCE_DIRECTORY)
    .filter((name) => /\.[ch]$/.test(name))
    .sort();
  const hash = createHash('sha256').update([arch(), ...FLAGS].join(' '));
  for (const name of sources) hash.update(`\0${name}\0`).update(readFileSync(join(SOURCE_DIRECTORY, name)));
  const path = join(directory, `strata-shim-${hash.digest('hex').slice(0, 16)}.so`);
  if (existsSync(path)) return path;

  mkdirSync(directory, { recursive: true });
  const partial = `${path}.${randomUUID()}.partial`;
  const inputs = sources.filter((name) => name.endsWith('.c')).map((name) => join(SOURCE_DIRECTORY, name));
  try {
    await compile([...FLAGS, ...UNFORTIFIED, '-o', partial, ...inputs, '-ldl'], options.compiler ?? process.env['CC']);
    chmodSync(partial, 0o755); // Postgres runs as another user
    renameSync(partial, path);
  } finally {
    rmSync(partial, { force: true });
  }
  return path;
}

async function compile(args: readonly string[], preferred: string | undefined): Promise<void> {
  const compilers = preferred ? [preferred, ...COMPILERS] : COMPILERS;
  for (const compiler of compilers) {
    try {
      await promisify(execFile)(compiler, [...args], { timeout: COMPILE_TIMEOUT_MS });
      return;
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code === 'ENOENT') continue;
      const words = (error as { stderr?: string }).stderr?.trim() || String(error);
      throw new StrataError('internal', `${compiler} could not compile the page shim: ${words}`, { cause: error });
    }
  }
  throw new StrataError(
    'bad-request',
    `no C compiler was found (tried ${compilers.join(', ')}), and the page shim needs one: install gcc or clang (for example apt-get install gcc libc6-dev), or name one in CC`,
  );
}
