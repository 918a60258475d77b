/**
 * Which safekeepers there are now, and where: what a proposer, or anybody else who must find all of a log, is told. It changes while they are at work.
 */
import { type Configuration, nodesOf } from '../consensus/configuration.ts';
import type { SafekeeperAddress } from './safekeeper.ts';

export interface SafekeeperSet {
  readonly configuration: Configuration;
  /** By node id, of all nodes of the configuration. */
  readonly addresses: ReadonlyMap<number, SafekeeperAddress>;
}

export interface SafekeeperDirectory {
  readonly current: SafekeeperSet;
  /** Calls back when it has changed, until the returned function is called. */
  watch(callback: () => void): () => void;
  /** A leader of the timeline has settled the configuration of this version (consensus/proposer.ts). */
  settled(timelineId: string, version: number): void;
}

/** Safekeepers that never change, with node ids from 1 on and no configuration. */
export function fixedSafekeepers(addresses: readonly SafekeeperAddress[]): SafekeeperDirectory {
  const nodeIds = addresses.map((_, index) => index + 1);
  const current = {
    configuration: { version: 0, members: nodeIds },
    addresses: new Map(addresses.map((address, index) => [index + 1, address])),
  };
  return { current, watch: () => () => {}, settled: () => {} };
}

/** Of all nodes of the configuration, the old members first. */
export function addressesOf({ configuration, addresses }: SafekeeperSet): SafekeeperAddress[] {
  return nodesOf(configuration).flatMap((nodeId) => addresses.get(nodeId) ?? []);
}
