package daemon

import "github.com/culvert-dev/culvert/daemon/api"

// inputs is all that a session's state follows from. Whoever learns something
// changes an input; nobody sets the state.
type inputs struct {
	wanted      bool      // nobody asked for the end
	failed      bool      // it cannot be, or cannot go on: the session has an error
	established bool      // it was connected once
	alive       bool      // its process runs
	reported    api.State // what the running process said last, "" at first
	undone      bool      // nothing of it is left on the machine
}

// next derives the state from the inputs.
func next(in inputs) api.State {
	switch {
	case in.undone:
		return api.Disconnected
	case !in.wanted || in.failed:
		return api.Disconnecting
	case !in.established:
		return api.Connecting
	case in.alive && (in.reported == api.Connected || in.reported == api.NeedsLogin):
		return in.reported
	}
	return api.Reconnecting
}
