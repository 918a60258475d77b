/** What the adoption of an imported cluster found, written to the row of its import (imports.ts). */
import type { AdoptionReport } from '../api/control.ts';
import type { ControlContext } from './context.ts';
import type { ImportRow } from './state.ts';

/** For use in the transaction in which a start ends. */
export function noteAdoption(context: ControlContext, branchId: string, report: AdoptionReport): void {
  const { state, now } = context;
  const row = state.get<ImportRow>('SELECT * FROM imports WHERE branch_id = ?', branchId);
  if (row?.state !== 'starting') return;
  const notes = [...(JSON.parse(row.notes) as string[]), ...report.notes];
  state.run(
    `UPDATE imports SET state = 'finished', error = NULL, notes = ?, updated_at = ? WHERE id = ?`,
    JSON.stringify(notes),
    now(),
    row.id,
  );
}
