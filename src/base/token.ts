/**
 * Tokens by which the parts of the platform know each other: HS256 JSON web tokens under the platform's secret.
 *
 * scope `platform`: the platform's own processes, everything is allowed.
 * scope `timeline`: a compute; it may read that one timeline's pages (and through it the ancestors'), nothing else.
 */
import { errors, jwtVerify, SignJWT } from 'jose';
import { StrataError } from './errors.ts';

export type TokenClaims = { readonly scope: 'platform' } | { readonly scope: 'timeline'; readonly timelineId: string };

/** `secret` is at least 32 random bytes. */
export async function signToken(secret: Uint8Array, claims: TokenClaims): Promise<string> {
  return new SignJWT({ ...claims }).setProtectedHeader({ alg: 'HS256' }).setIssuer('strata').sign(secret);
}

/** Throws `unauthorized` for a token that is not ours. */
export async function verifyToken(secret: Uint8Array, token: string): Promise<TokenClaims> {
  try {
    const { payload } = await jwtVerify(token, secret, { issuer: 'strata', algorithms: ['HS256'] });
    if (payload['scope'] === 'platform') return { scope: 'platform' };
    const timelineId = payload['timelineId'];
    if (payload['scope'] === 'timeline' && typeof timelineId === 'string') return { scope: 'timeline', timelineId };
  } catch (error) {
    const what =
      error instanceof errors.JWTExpired ? 'the token has expired' : 'the token is not signed by this platform';
    throw new StrataError('unauthorized', what, { cause: error });
  }
  throw new StrataError('unauthorized', 'the token has no known scope');
}

/** True when the claims allow reading the timeline. */
export function mayReadTimeline(claims: TokenClaims, timelineId: string): boolean {
  return claims.scope === 'platform' || claims.timelineId === timelineId;
}
