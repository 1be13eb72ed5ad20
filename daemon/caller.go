package daemon

import (
	"context"
	"slices"
)

// caller is who is at the other end of a connection, as the kernel says.
type caller struct {
	UID, GID int
	Groups   []uint32
	err      error // he could not be identified, or may not be here
}

// mayUse: a user sees and stops only his own sessions, root all.
func (c caller) mayUse(uid int) bool { return c.err == nil && (c.UID == 0 || c.UID == uid) }

func (c caller) in(gid int) bool {
	return gid >= 0 && (c.GID == gid || slices.Contains(c.Groups, uint32(gid)))
}

type callerKey struct{}

func callerOf(ctx context.Context) (caller, bool) {
	c, ok := ctx.Value(callerKey{}).(caller)
	return c, ok
}
