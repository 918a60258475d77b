/**
 * Keeps the layout's promises: which folder of src/ may import which, and no folder or file whose name says nothing.
 * Part of `npm run check`. Prints each violation with file and line; exit code 1 when there is one.
 */
import { readdirSync, readFileSync } from 'node:fs';
import { dirname, join, relative, resolve } from 'node:path';

const root = resolve(import.meta.dirname, '..');
const source = join(root, 'src');

/** Folder of src/ → folders of src/ it may import besides itself. A service never imports another service. */
const ALLOWED: Readonly<Record<string, readonly string[]>> = {
  base: [],
  postgres: ['base'],
  consensus: ['base', 'postgres'],
  'object-store': ['base'],
  api: ['base', 'postgres', 'consensus'],
  compute: ['base', 'postgres', 'consensus', 'api'],
  safekeeper: ['base', 'postgres', 'consensus', 'api', 'object-store'],
  pageserver: ['base', 'postgres', 'api', 'object-store'],
  proxy: ['base', 'postgres', 'api'],
  control: ['base', 'postgres', 'api'],
  cli: ['base', 'postgres', 'api'],
  platform: [
    'base',
    'postgres',
    'consensus',
    'api',
    'object-store',
    'compute',
    'safekeeper',
    'pageserver',
    'proxy',
    'control',
    'cli',
  ],
};
const EMPTY_NAMES = new Set(['utils', 'util', 'helpers', 'common', 'types', 'misc', 'index.ts']);
const IMPORT = /^\s*(?:import|export)\b[^'"]*?from\s+['"]([^'"]+)['"]/;

const violations: string[] = [];

for (const entry of readdirSync(source, { recursive: true, withFileTypes: true })) {
  const path = join(entry.parentPath, entry.name);
  if (EMPTY_NAMES.has(entry.name)) violations.push(`${relative(root, path)}: a name that says nothing`);
  if (entry.isFile() && entry.name.endsWith('.ts')) checkFile(path);
}

if (violations.length > 0) {
  console.error(violations.join('\n'));
  process.exit(1);
}

function checkFile(path: string): void {
  const folder = relative(source, path).split('/')[0] ?? '';
  const lines = readFileSync(path, 'utf8').split('\n');
  lines.forEach((line, index) => {
    const target = IMPORT.exec(line)?.[1] ?? /^} from ['"]([^'"]+)['"]/.exec(line)?.[1];
    const where = `${relative(root, path)}:${index + 1}`;
    if (/^export default\b/.test(line)) violations.push(`${where}: a default export`);
    if (target === undefined || !target.startsWith('.')) return;
    const imported = relative(source, resolve(dirname(path), target)).split('/')[0] ?? '';
    if (imported === folder || folder.endsWith('.ts')) return; // main.ts may import everything
    if (path.endsWith('.test.ts')) return; // tests put parts together
    if (!(ALLOWED[folder] ?? []).includes(imported)) {
      violations.push(`${where}: ${folder}/ may not import ${imported}/ (${target})`);
    }
  });
}
