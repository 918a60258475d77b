/** Ends a connection by a reset. Node cannot reset one that it is shutting down: it would never close it, and the process would not end. */
import type { Socket } from 'node:net';

export function resetSocket(socket: Socket): void {
  if (socket.writableEnded) socket.destroy();
  else socket.resetAndDestroy();
}
