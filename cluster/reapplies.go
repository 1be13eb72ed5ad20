package cluster

import (
	"slices"
	"time"
)

// Somebody else's change of a Service is overwritten this often; who comes back
// more often means it, and theirs stays.
const (
	maxReapplies  = 3
	reapplyWindow = 10 * time.Minute
)

// reapplies is when a change was overwritten, oldest first. It is kept in the
// Record, and so outlives the session.
type reapplies []time.Time

// add says whether one more is allowed at now, and returns what to keep: those
// that still count, and now if it is.
func (r reapplies) add(now time.Time) (reapplies, bool) {
	kept := slices.DeleteFunc(slices.Clone(r), func(t time.Time) bool { return now.Sub(t) >= reapplyWindow })
	if len(kept) >= maxReapplies {
		return kept, false
	}
	return append(kept, now), true
}
