package daemon

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/culvert-dev/culvert/daemon/api"
)

// The sessions with intercepts that are remembered over a crash, per machine and per
// user: those that live, and those whose cluster does not answer.
const maxKept, maxOwnKept = 256, 64

// keptRecord is what outlives the daemon of a session that has intercepts: whose
// it is and how to reach its cluster. What it changed there is in the user's own
// journal, which root does not read.
type keptRecord struct {
	UID     int         `json:"uid"`
	ID      string      `json:"id"` // of the session
	Options api.Options `json:"options"`
	ByRoot  bool        `json:"byRoot,omitempty"`
	// StateHome is where the session found its user's state directory: the journal
	// is there. It is a path of the user's, and opened by nobody but him.
	StateHome string `json:"stateHome,omitempty"`
}

// name has the session's id, which the daemon chose.
func (r keptRecord) name() string { return fmt.Sprintf("%d-%s.json", r.UID, r.ID) }

func newKeptStore(dir string) *records[keptRecord] {
	return &records[keptRecord]{dir: filepath.Join(dir, "intercepts"), what: "session with intercepts", most: maxKept, own: maxOwnKept}
}

// kept is what is remembered of s while it has intercepts.
func (s *session) kept() keptRecord {
	r := keptRecord{UID: s.account.UID, ID: s.id, Options: s.options, ByRoot: s.byRoot}
	values := map[string]string{}
	for _, kv := range s.env {
		name, value, _ := strings.Cut(kv, "=")
		values[name] = value
	}
	if r.StateHome = values["XDG_STATE_HOME"]; !filepath.IsAbs(r.StateHome) && values["HOME"] != "" {
		r.StateHome = filepath.Join(values["HOME"], ".local", "state")
	}
	return r
}

// revert has what dead sessions left in clusters undone: for each record a
// session process runs as its user, until one succeeded or ctx ends.
func (v *supervisor) revert(ctx context.Context) {
	v.running = ctx
	records, err := v.kept.list()
	if err != nil {
		v.log.Error("reading the sessions with intercepts", "error", err)
	}
	for _, r := range records {
		v.wg.Go(func() { v.revertOne(ctx, r) })
	}
}

func (v *supervisor) revertOne(ctx context.Context, r keptRecord) {
	log := v.log.With("uid", r.UID, "session", r.ID)
	for delay := minBootDelay; ctx.Err() == nil && v.kept.has(r); delay = min(2*delay, maxBootDelay) {
		err := v.tryRevert(ctx, r)
		if err == nil {
			log.Info("what the session had left in the cluster was undone")
			if err := v.kept.remove(r); err != nil {
				log.Error("forgetting it", "error", err)
			}
			return
		}
		if ctx.Err() == nil {
			log.Warn("undoing what the session left in the cluster: will try again", "in", delay, "error", err)
			sleep(ctx, delay)
		}
	}
}

// tryRevert runs one process that undoes, and returns nil if it did.
func (v *supervisor) tryRevert(ctx context.Context, r keptRecord) error {
	a, err := lookup(r.UID)
	if err == nil {
		a, err = a.withGroups()
	}
	if err != nil {
		return err
	}
	env := bootEnv(a)
	if r.StateHome != "" {
		env = append(env, "XDG_STATE_HOME="+r.StateHome)
	}
	s, err := v.newSession(a, api.ConnectRequest{Options: r.Options}, env, r.ByRoot, r.ID)
	if err != nil {
		return err
	}
	v.start(s)
	select {
	case <-s.done:
	case <-ctx.Done():
		return ctx.Err() // stop ends it
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.reverted:
		return nil
	case s.err != nil:
		return s.err
	}
	return errors.New("the session process did not say that it was done")
}
