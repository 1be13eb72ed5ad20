package daemon

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/culvert-dev/culvert/daemon/api"
)

// maxEnded bounds the ended sessions whose output is kept for `culvert logs`:
// at most maxEnded times ringSize bytes.
const maxEnded = 4

// supervisor owns all sessions.
type supervisor struct {
	cfg     Config
	log     *slog.Logger
	machine *machine
	boot    *records[bootRecord]
	kept    *records[keptRecord]
	hurry   chan struct{} // closed when the daemon ends
	gid     int           // of the group that may use the daemon, -1: root only
	wg      sync.WaitGroup
	running context.Context // ends when the daemon does; set before sessions are

	mu       sync.Mutex
	sessions map[string]*session
	past     []*session // ended, oldest first
	watchers map[*watcher]struct{}
	stopping bool
}

func newSupervisor(cfg Config, gid int) *supervisor {
	v := &supervisor{
		cfg:      cfg,
		gid:      gid,
		log:      cfg.Log.With("part", "supervisor"),
		boot:     newBootStore(cfg.StateDir),
		kept:     newKeptStore(cfg.StateDir),
		hurry:    make(chan struct{}),
		sessions: make(map[string]*session),
		watchers: make(map[*watcher]struct{}),
	}
	v.machine = newMachine(cfg)
	return v
}

// newSession notes a session without starting it. byRoot: root asked for it on
// the user's behalf. revert: it only undoes what the session of that id left.
func (v *supervisor) newSession(a account, req api.ConnectRequest, env []string, byRoot bool, revert string) (*session, error) {
	id := revert
	if id == "" {
		id = newID()
	}
	s := &session{
		id:      id,
		revert:  revert != "",
		started: time.Now(),
		account: a,
		options: req.Options,
		env:     env,
		atBoot:  req.AtBoot,
		byRoot:  byRoot,
		sup:     v,
		output:  newRing(),
		wake:    make(chan struct{}, 1),
		hurry:   v.hurry,
		done:    make(chan struct{}),
	}
	s.in.wanted = true
	s.log = v.log.With("session", s.id, "uid", a.UID)

	v.mu.Lock()
	defer v.mu.Unlock()
	if v.stopping {
		return nil, &api.Error{Code: api.CodeDaemon, Message: "culvertd is being stopped", Hint: "sudo systemctl start culvertd"}
	}
	if len(v.sessions) >= v.cfg.MaxSessions {
		return nil, &api.Error{Code: api.CodeUsage, Message: fmt.Sprintf("%d sessions run on this machine, which is the most that root allows", len(v.sessions)), Hint: "culvert disconnect, or maxSessions in " + v.cfg.File}
	}
	used, own := make(map[int]bool), 0
	for _, other := range v.sessions {
		used[other.slot] = true
		if other.account.UID == a.UID && !other.revert {
			own++
		}
	}
	// One user, or his script gone mad, leaves room for the others.
	if most := (v.cfg.MaxSessions + 1) / 2; own >= most && !s.revert {
		return nil, &api.Error{Code: api.CodeUsage, Message: fmt.Sprintf("%d sessions of yours run on this machine, which is the most for one user", own), Hint: "culvert disconnect, or maxSessions in " + v.cfg.File}
	}
	for used[s.slot] {
		s.slot++
	}
	v.sessions[s.id] = s
	return s, nil
}

// start runs a session that newSession made.
func (v *supervisor) start(s *session) { v.wg.Go(s.run) }

// selected returns the sessions a caller means, oldest first.
func (v *supervisor) selected(c caller, id, context string) []*session {
	v.mu.Lock()
	defer v.mu.Unlock()
	var list []*session
	for _, s := range v.sessions {
		if c.mayUse(s.account.UID) && (id == "" || s.id == id) && (context == "" || s.snapshot().Context == context) {
			list = append(list, s)
		}
	}
	slices.SortFunc(list, byAge)
	return list
}

// whole is selected without those that only undo what an earlier session left.
func (v *supervisor) whole(c caller, id, context string) []*session {
	return slices.DeleteFunc(v.selected(c, id, context), func(s *session) bool { return s.revert })
}

// one returns the only session that a caller can mean.
func (v *supervisor) one(c caller, id, context string) (*session, error) {
	list := v.whole(c, id, context)
	if len(list) > 1 { // a whole session can do all that one of intercepts only can
		if whole := slices.DeleteFunc(slices.Clone(list), func(s *session) bool { return s.options.InterceptOnly }); len(whole) == 1 {
			list = whole
		}
	}
	switch {
	case len(list) == 1:
		return list[0], nil
	case len(list) > 1:
		var ids []string
		for _, s := range list {
			ids = append(ids, fmt.Sprintf("%s (context %s)", s.id, s.snapshot().Context))
		}
		return nil, &api.Error{Code: api.CodeUsage, Message: "several sessions are meant: " + strings.Join(ids, ", "), Hint: "name one with --context or by its id"}
	}
	return nil, notFound(id, context)
}

func notFound(id, context string) *api.Error {
	e := &api.Error{Code: api.CodeNotFound, Message: "you have no session", Hint: "culvert connect"}
	if id != "" {
		e.Message += " " + id
	}
	if context != "" {
		e.Message += " of context " + context
	}
	if id != "" || context != "" {
		e.Hint = "culvert status"
	}
	return e
}

// outputOf returns the session whose log a caller means: one that runs, or else
// the last that ended.
func (v *supervisor) outputOf(c caller, id string) (*session, error) {
	s, err := v.one(c, id, "")
	if err == nil || asAPI(err).Code != api.CodeNotFound {
		return s, err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, s := range slices.Backward(v.past) {
		if c.mayUse(s.account.UID) && (id == "" || s.id == id) {
			return s, nil
		}
	}
	return nil, err
}

// idle: no session is on this machine.
func (v *supervisor) idle() bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return len(v.sessions) == 0
}

// connected remembers an at-boot session once it proved to work.
func (v *supervisor) connected(s *session) {
	if !s.atBoot {
		return
	}
	if err := v.boot.save(bootRecord{UID: s.account.UID, Options: s.options, ByRoot: s.byRoot}); err != nil {
		s.log.Error("remembering the session for the next boot", "error", err)
	}
}

// ended forgets a session of which nothing is left, but for its output.
func (v *supervisor) ended(s *session) {
	s.output.close()
	v.mu.Lock()
	defer v.mu.Unlock()
	delete(v.sessions, s.id)
	if r := s.kept(); !v.stopping && !s.revert && v.kept.has(r) { // it could not undo all that it did in its cluster
		v.wg.Go(func() { v.revertOne(v.running, r) })
	}
	s.env = nil
	v.past = append(v.past, s)
	if len(v.past) > maxEnded {
		v.past = slices.Delete(v.past, 0, 1)
	}
}

// stop ends all sessions and waits for them.
func (v *supervisor) stop() {
	v.mu.Lock()
	v.stopping = true
	list := make([]*session, 0, len(v.sessions))
	for _, s := range v.sessions {
		list = append(list, s)
	}
	v.mu.Unlock()
	close(v.hurry)
	for _, s := range list {
		s.end(&api.Error{Code: api.CodeCanceled, Message: "culvertd was stopped"})
	}
	for _, s := range list {
		<-s.done
	}
	v.wg.Wait()
}

// watcher is one reader of changes. A reader that is slower than maxQueue
// changes loses older states of a session, never its last one.
type watcher struct {
	wants func(*api.Session) bool
	more  chan struct{} // one token

	mu    sync.Mutex
	queue []api.Session
}

// maxQueue bounds what waits for one watcher, in changes.
const maxQueue = 64

// watch adds a watcher that first finds the present sessions in its queue.
func (v *supervisor) watch(wants func(*api.Session) bool) *watcher {
	w := &watcher{wants: wants, more: make(chan struct{}, 1)}
	v.mu.Lock()
	defer v.mu.Unlock()
	var list []*session
	for _, s := range v.sessions {
		list = append(list, s)
	}
	slices.SortFunc(list, byAge)
	for _, s := range list {
		if now := s.snapshot(); now.State != "" {
			w.put(now)
		}
	}
	v.watchers[w] = struct{}{}
	return w
}

func (v *supervisor) unwatch(w *watcher) {
	v.mu.Lock()
	defer v.mu.Unlock()
	delete(v.watchers, w)
}

func (v *supervisor) publish(s api.Session) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for w := range v.watchers {
		w.put(s)
	}
}

func (w *watcher) put(s api.Session) {
	if !w.wants(&s) {
		return
	}
	w.mu.Lock()
	if len(w.queue) >= maxQueue {
		w.queue = slices.DeleteFunc(w.queue, func(old api.Session) bool { return old.ID == s.ID })
	}
	w.queue = append(w.queue, s)
	w.mu.Unlock()
	select {
	case w.more <- struct{}{}:
	default:
	}
}

// next returns what is new, or nil when ctx ended.
func (w *watcher) next(ctx context.Context) []api.Session {
	for {
		w.mu.Lock()
		list := w.queue
		w.queue = nil
		w.mu.Unlock()
		if len(list) > 0 {
			return list
		}
		select {
		case <-w.more:
		case <-ctx.Done():
			return nil
		}
	}
}

func byAge(a, b *session) int {
	return cmp.Or(a.started.Compare(b.started), cmp.Compare(a.id, b.id))
}

// newID names a session: short enough to type, and in the names of its objects
// in the cluster.
func newID() string {
	b := make([]byte, 4)
	rand.Read(b)
	return hex.EncodeToString(b)
}
