package daemon

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/daemon/link"
	"github.com/culvert-dev/culvert/internal/version"
	"github.com/culvert-dev/culvert/router"
	"github.com/culvert-dev/culvert/tun"
)

const (
	// maxPings bounds one request; a person who wants more asks again.
	maxPings     = 1000
	pingInterval = time.Second
	pingTimeout  = 3 * time.Second // api.PingRequest.Timeout's default
	// pingGrace is for the session's own work around a probe: finding the target.
	pingGrace = 10 * time.Second
)

func (s *server) version(w http.ResponseWriter, r *http.Request) {
	answer(w, api.Version{Version: version.Version, PID: os.Getpid()})
}

func (s *server) sessions(w http.ResponseWriter, r *http.Request) {
	who, _ := callerOf(r.Context())
	list := []api.Session{}
	for _, one := range s.sup.selected(who, "", "") {
		list = append(list, one.snapshot())
	}
	answer(w, list)
}

func (s *server) watch(w http.ResponseWriter, r *http.Request) {
	who, _ := callerOf(r.Context())
	watch := s.sup.watch(func(e *api.Session) bool { return who.mayUse(e.UID) })
	defer s.sup.unwatch(watch)
	out := newStream(w)
	for events := watch.next(r.Context()); events != nil; events = watch.next(r.Context()) {
		for _, e := range events {
			if out.event(e) != nil {
				return
			}
		}
	}
	out.end(&api.Error{Code: api.CodeDaemon, Message: "culvertd was stopped", Hint: "sudo systemctl start culvertd"})
}

// connect makes a session and shows its way until it is connected. A caller
// who goes away before that cancels it.
func (s *server) connect(w http.ResponseWriter, r *http.Request) {
	who, _ := callerOf(r.Context())
	var req api.ConnectRequest
	if err := read(r, &req); err != nil {
		refuse(w, err)
		return
	}
	acc, env, err := s.identity(who, req)
	if err != nil {
		refuse(w, err)
		return
	}
	if _, err := checkBinary(s.cfg.SessionBinary); err != nil {
		refuse(w, err)
		return
	}
	one, err := s.sup.newSession(acc, req, env, who.UID == 0, "")
	if err != nil {
		refuse(w, err)
		return
	}
	watch := s.sup.watch(func(e *api.Session) bool { return e.ID == one.id })
	defer s.sup.unwatch(watch)
	s.sup.start(one)
	cancel := func() {
		one.end(&api.Error{Code: api.CodeCanceled, Message: "connecting was interrupted"})
	}
	out := newStream(w)
	for events := watch.next(r.Context()); events != nil; events = watch.next(r.Context()) {
		for _, e := range events {
			if out.event(e) != nil {
				cancel()
				return
			}
			switch e.State {
			case api.Connected:
				out.end(nil)
				return
			case api.Disconnected:
				if e.Error == nil {
					e.Error = &api.Error{Code: api.CodeCanceled, Message: "disconnected before it was connected"}
				}
				out.end(e.Error)
				return
			}
		}
	}
	cancel()
	out.end(&api.Error{Code: api.CodeCanceled, Message: "culvertd was stopped"})
}

// identity decides whom a session runs as and with which environment.
func (s *server) identity(who caller, req api.ConnectRequest) (account, []string, error) {
	switch {
	case who.UID != 0 && req.AsUID != 0 && req.AsUID != who.UID:
		return account{}, nil, &api.Error{Code: api.CodeDenied, Message: fmt.Sprintf("uid %d may not connect as uid %d; only root may", who.UID, req.AsUID)}
	case who.UID == 0 && req.AsUID <= 0:
		return account{}, nil, errRootSession
	case who.UID == 0:
		a, err := lookup(req.AsUID)
		if err == nil {
			a, err = a.withGroups()
		}
		if err != nil {
			return account{}, nil, err
		}
		env, err := sudoEnv(req.Env, a)
		return a, env, err
	}
	a, err := lookup(who.UID)
	if err != nil {
		a = account{} // a user without an entry may still connect
	}
	a.UID, a.GID, a.Groups = who.UID, who.GID, who.Groups
	if err != nil && req.AtBoot {
		return account{}, nil, err
	}
	env, err := callerEnv(req.Env)
	return a, env, err
}

// disconnect ends sessions and shows it until nothing of them is left.
func (s *server) disconnect(w http.ResponseWriter, r *http.Request) {
	who, _ := callerOf(r.Context())
	var req api.DisconnectRequest
	if err := read(r, &req); err != nil {
		refuse(w, err)
		return
	}
	// One that undoes what a dead session left goes on: whoever asks for its end, a
	// command whose session died perhaps, wants just that.
	list := s.sup.whole(who, req.ID, req.Context)
	forgotten := s.sup.forgetBoot(who, func(b bootRecord) bool {
		for _, one := range list {
			if one.account.UID == b.UID && (bootRecord{UID: b.UID, Options: one.options}).name() == b.name() {
				return true
			}
		}
		return req.ID == "" && (req.Context == "" || req.Context == b.Options.Context)
	})
	if len(list) == 0 && forgotten == 0 && (req.ID != "" || req.Context != "") {
		refuse(w, notFound(req.ID, req.Context))
		return
	}
	ours := make(map[string]*session)
	for _, one := range list {
		ours[one.id] = one
	}
	watch := s.sup.watch(func(e *api.Session) bool { return ours[e.ID] != nil })
	defer s.sup.unwatch(watch)
	for _, one := range list {
		one.end(&api.Error{Code: api.CodeCanceled, Message: "disconnected"})
	}
	finished := make(chan struct{})
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	go func() {
		defer close(finished)
		for _, one := range list {
			select {
			case <-one.done:
			case <-ctx.Done():
				return
			}
		}
		cancel()
	}()
	out := newStream(w)
	for events := watch.next(ctx); events != nil; events = watch.next(ctx) {
		for _, e := range events {
			if out.event(e) != nil {
				return // it goes on without the caller
			}
		}
	}
	<-finished
	for _, one := range list {
		select {
		case <-one.done:
		default:
			out.end(&api.Error{Code: api.CodeDaemon, Message: "culvertd was stopped"})
			return
		}
	}
	out.end(nil)
}

// ping asks the session for one probe after the other, so that each reply is
// shown as it comes.
func (s *server) ping(w http.ResponseWriter, r *http.Request) {
	who, _ := callerOf(r.Context())
	var req api.PingRequest
	if err := read(r, &req); err != nil {
		refuse(w, err)
		return
	}
	if req.Count == 0 {
		req.Count = 4
	}
	if req.Timeout == 0 {
		req.Timeout = pingTimeout
	}
	if req.Target == "" || req.Count < 0 || req.Count > maxPings || req.Timeout < 0 || req.Timeout > time.Minute {
		refuse(w, &api.Error{Code: api.CodeUsage, Message: fmt.Sprintf("ping needs a target, a count of at most %d and a timeout of at most 1m", maxPings)})
		return
	}
	one, err := s.sup.one(who, req.ID, req.Context)
	if err != nil {
		refuse(w, err)
		return
	}
	out := newStream(w)
	count := req.Count
	req.Count = 1
	for seq := 1; seq <= count; seq++ {
		began := time.Now()
		replies, err := one.probe(r.Context(), req)
		if err != nil {
			out.end(err)
			return
		}
		for _, p := range replies {
			p.Seq, p.Target, p.Error = seq, cleanText(p.Target), cleanText(p.Error)
			if out.line(api.Line{Ping: &p}) != nil {
				return
			}
		}
		if seq < count {
			sleep(r.Context(), time.Until(began.Add(pingInterval)))
		}
	}
	out.end(nil)
}

// probe asks the session process for one probe.
func (s *session) probe(ctx context.Context, req api.PingRequest) ([]api.PingReply, error) {
	conn := s.connection()
	if conn == nil {
		return nil, &api.Error{Code: api.CodeAgent, Message: "the session is " + string(s.snapshot().State), Hint: "culvert status"}
	}
	ctx, cancel := context.WithTimeout(ctx, req.Timeout+pingGrace)
	defer cancel()
	var replies []api.PingReply
	_, err := conn.Call(ctx, link.MethodPing, req, &replies)
	if errors.Is(err, context.DeadlineExceeded) {
		return nil, &api.Error{Code: api.CodeTimeout, Message: "the session did not answer", Hint: "culvert logs"}
	}
	if len(replies) > 16 {
		replies = replies[:16]
	}
	if err != nil {
		return nil, cleanError(asAPI(err))
	}
	return replies, nil
}

func (s *server) logs(w http.ResponseWriter, r *http.Request) {
	who, _ := callerOf(r.Context())
	one, err := s.sup.outputOf(who, r.URL.Query().Get("id"))
	if err != nil {
		refuse(w, err)
		return
	}
	out := newStream(w)
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	one.output.copyTo(r.Context(), out, r.URL.Query().Get("follow") == "true")
}

func (s *server) facts(w http.ResponseWriter, r *http.Request) {
	who, _ := callerOf(r.Context())
	var req api.FactsRequest
	if err := read(r, &req); err != nil {
		refuse(w, err)
		return
	}
	if err := router.ValidateExcluded(req.Plan); err != nil { // bounds them, allows any
		refuse(w, err)
		return
	}
	f := api.Facts{Version: version.Version, Socket: s.cfg.Socket, TUN: "ok", Congestion: router.Congestion()}
	if err := tun.Available(); err != nil {
		f.TUN = err.Error()
	}
	if dns, err := router.NewDNS(router.DNSAuto, s.cfg.Router); err != nil {
		f.DNSMode, f.DNSWhy = router.DNSNone, err.Error()
	} else {
		f.DNSMode, f.DNSWhy = dns.Mode(), dns.Why()
	}
	f.SessionPath = s.cfg.SessionBinary + ": ok"
	if _, err := checkBinary(s.cfg.SessionBinary); err != nil {
		f.SessionPath = strings.TrimPrefix(asAPI(err).Message, "the session program ")
	}
	conflicts, err := s.sup.machine.conflicts(who, req.Plan)
	if err != nil {
		refuse(w, err)
		return
	}
	f.Conflicts = conflicts
	if s.sup.idle() {
		f.Leftovers = s.cfg.Router.Leftovers()
	}
	answer(w, f)
}
