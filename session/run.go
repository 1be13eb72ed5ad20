package session

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/culvert-dev/culvert/cluster"
	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/daemon/link"
	"github.com/culvert-dev/culvert/internal/cores"
	"github.com/culvert-dev/culvert/wire/netstack"
)

// cleanupTime bounds what a session does in the cluster after it was told to
// end, or after its daemon died: long enough for a slow API server, short enough
// that nobody waits for a dead one.
const cleanupTime = 15 * time.Second

// undoTime bounds what a session that ends does about its intercepts, and
// endDrain how long open connections have then.
const undoTime, endDrain = 30 * time.Second, 5 * time.Second

// loopsTime bounds the wait for the loops, whose context is done: they end at
// once but for a request that the API server is just answering.
const loopsTime = 3 * time.Second

// Run is the hidden role of the culvert binary: it takes the link from the
// daemon (descriptor 3), connects, and returns when the session has ended. The
// error is the user's answer to why it ended other than by being asked to; it
// has been told to the daemon already.
func Run(ctx context.Context) error {
	conn, err := link.FromDaemon()
	if err != nil {
		return fmt.Errorf("this command is started by culvertd only: %w", err)
	}
	defer conn.Close()
	// The daemon ends a session over the link; a signal is somebody's kill.
	killed, stop := signal.NotifyContext(ctx, syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	signal.Ignore(syscall.SIGHUP, syscall.SIGPIPE)
	go cores.Adapt(ctx)

	// The API client's own connection: after a cut it is noticed dead, and dialled
	// anew, in 8 s instead of 45 (k8s.io/apimachinery/pkg/util/net reads these).
	for name, seconds := range map[string]string{"HTTP2_READ_IDLE_TIMEOUT_SECONDS": "5", "HTTP2_PING_TIMEOUT_SECONDS": "3"} {
		if os.Getenv(name) == "" {
			os.Setenv(name, seconds)
		}
	}

	s := newSession(conn)
	conn.Handle(link.MethodDisconnect, s.handleDisconnect)
	conn.Handle(link.MethodPing, s.handlePing)
	conn.Handle(link.MethodPeers, s.handlePeers)
	conn.Handle(link.MethodPeerAdd, s.handlePeerAdd)
	conn.Handle(link.MethodPeerRemove, s.handlePeerRemove)
	conn.Handle(link.MethodIntercept, task(s, s.intercepts.start))
	conn.Handle(link.MethodLeave, task(s, s.intercepts.leave))
	conn.Handle(link.MethodIntercepts, s.handleIntercepts)
	conn.Handle(link.MethodCancel, s.handleCancel)
	conn.Handle(link.MethodAlive, handleAlive)
	conn.Handle(link.MethodSiblings, s.handleSiblings)
	conn.Handle(link.MethodMachineDNS, s.handleMachineDNS)
	linkDone := make(chan error, 1)
	go func() { linkDone <- conn.Run(context.WithoutCancel(ctx)) }()

	var start link.Start
	if _, err := conn.Call(ctx, link.MethodHello, nil, &start); err != nil {
		return fmt.Errorf("asking the daemon what to connect to: %w", err)
	}
	level := slog.LevelInfo
	if start.Options.Debug {
		level = slog.LevelDebug
	}
	s.log = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level}))
	netstack.LogTo(s.log)
	s.log.Info("session starts", "id", start.ID, "uid", os.Getuid(), "restart", start.Restart)

	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go func() {
		select {
		case <-killed.Done():
			cancel(errKilled)
		case <-s.disconnect:
			cancel(errDisconnect)
		case err := <-linkDone:
			cancel(fmt.Errorf("%w: %v", errDaemonGone, err))
		case <-ctx.Done():
		}
	}()

	if start.Revert {
		return s.revertRun(ctx, start)
	}
	err = s.run(ctx, start)
	if cause := context.Cause(ctx); cause != nil {
		err = cause
	}
	cancel(nil) // the loops end whatever ended the session
	s.end(err)
	switch {
	case errors.Is(err, errDisconnect):
		return nil
	default:
		return err
	}
}

// handleAlive answers the daemon, which replaces a process that does not.
func handleAlive(context.Context, json.RawMessage, []*os.File) (any, []*os.File, error) {
	return nil, nil, nil
}

var (
	errDisconnect = errors.New("asked to disconnect")
	errDaemonGone = errors.New("the daemon is gone")
	errKilled     = errors.New("killed by a signal")
)

// end undoes what the session did in the cluster and says its last word. A
// session that somebody killed (SIGTERM) leaves the agent and says nothing: the
// daemon starts another process, which finds it again.
func (s *Session) end(err error) {
	if errors.Is(err, errKilled) {
		s.close()
		s.log.Info("session process ends; another one takes over")
		return
	}
	daemonGone := errors.Is(err, errDaemonGone)
	if daemonGone {
		// Nobody owns the device, the routes and the names any more: let go of
		// them at once, the cluster can wait.
		s.close()
	}
	s.status.update(func(st *api.Session) {
		st.State, st.Step, st.Cause = api.Disconnecting, "removing the agent", ""
		if s.intercepts.some() {
			st.Step = "giving Services back to their pods"
		}
	})
	// A redial under way might make the agent again after it was removed, and a
	// heartbeat its Lease.
	s.waitLoops(loopsTime)
	if s.cluster != nil {
		ctx, cancel := context.WithTimeout(context.Background(), undoTime)
		if err := s.intercepts.stopAll(ctx, endDrain, daemonGone); err != nil {
			s.log.Warn("undoing intercepts", "err", err)
			s.status.update(func(st *api.Session) {
				st.Notes = append(st.Notes, "intercepts could not all be undone (`culvert recover` does): "+err.Error())
			})
		}
		cancel()
	}
	ctx, cancel := context.WithTimeout(context.Background(), cleanupTime)
	defer cancel()
	undone := true
	if e := s.removeAgent(ctx); e != nil {
		undone = false
		s.log.Warn("removing the agent", "err", e)
		s.status.update(func(st *api.Session) {
			st.Notes = append(st.Notes, "the agent could not be removed: "+e.Error())
		})
	}
	// Last, since without it the agent looks dead to everybody.
	if s.recall().Heartbeat && s.cluster != nil {
		s.reached(cluster.StepLeaseDeleted)
		if e := s.cluster.DeleteLease(ctx, s.cluster.Namespace(), s.id); e != nil {
			undone = false
			s.log.Warn("deleting the heartbeat", "err", e)
		}
	}
	// What could not be undone, or was not taken up again yet, the daemon has another
	// process undo.
	if undone && len(s.recall().Intercepts) == 0 {
		if e := s.intercepts.forget(ctx); e != nil {
			s.log.Info("forgetting what was undone", "err", e)
		}
	}
	s.close()
	s.status.update(func(st *api.Session) {
		st.State, st.Step = api.Disconnected, ""
		if !errors.Is(err, errDisconnect) {
			st.Error = asError(err)
		}
	})
	s.log.Info("session ends", "err", err)
}

// asError gives any error the form that users see.
func asError(err error) *api.Error {
	var e *api.Error
	if errors.As(err, &e) {
		return e
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return &api.Error{Code: api.CodeTimeout, Message: err.Error(), Hint: "--timeout sets how long connect may take; `culvert logs` shows where it waited"}
	}
	return &api.Error{Code: api.CodeInternal, Message: err.Error(), Hint: "`culvert logs` shows more"}
}
