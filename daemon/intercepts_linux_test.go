package daemon

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/daemon/link"
	"golang.org/x/sys/unix"
)

// intercepts has the fake session answer what concerns them: a Service called
// "error" is refused, one called "hang" never starts.
func (f *fake) intercepts() {
	cancelled := make(chan struct{}, 1)
	read := func(params json.RawMessage, into any) (link.Task, error) {
		var t link.Task
		if err := json.Unmarshal(params, &t); err != nil {
			return t, err
		}
		return t, json.Unmarshal(t.Request, into)
	}
	f.conn.Handle(link.MethodCancel, func(context.Context, json.RawMessage, []*os.File) (any, []*os.File, error) {
		os.WriteFile("/run/home/alice/cancelled", nil, 0o644)
		cancelled <- struct{}{}
		return nil, nil, nil
	})
	f.conn.Handle(link.MethodIntercept, func(ctx context.Context, params json.RawMessage, _ []*os.File) (any, []*os.File, error) {
		var req api.InterceptRequest
		task, err := read(params, &req)
		if err != nil {
			return nil, nil, err
		}
		f.conn.Notify(link.MethodStep, link.Step{ID: task.ID, Text: "looking\x1b[31m at it"})
		f.conn.Notify(link.MethodStep, link.Step{ID: task.ID + 1000, Text: "of nobody"})
		switch req.Target {
		case "error":
			return nil, nil, &api.Error{Code: api.CodeExists, Message: "taken\x1b[31m", Hint: "x"}
		case "hang":
			<-cancelled
			return nil, nil, &api.Error{Code: api.CodeCanceled, Message: "cancelled"}
		}
		if _, err := f.call(link.MethodKeep, true, nil); err != nil {
			return nil, nil, err
		}
		return api.Intercept{Kind: req.Kind, Service: req.Target + "\x1b[31m", Ports: []api.InterceptPort{{Port: 80, Name: "\x1bweb"}}}, nil, nil
	})
	f.conn.Handle(link.MethodLeave, func(ctx context.Context, params json.RawMessage, _ []*os.File) (any, []*os.File, error) {
		var req api.LeaveRequest
		if _, err := read(params, &req); err != nil {
			return nil, nil, err
		}
		if f.start.Options.Labels["has"] != req.Service {
			return nil, nil, &api.Error{Code: api.CodeNotFound, Message: "no such intercept"}
		}
		_, err := f.call(link.MethodKeep, false, nil)
		return []api.Intercept{{Service: req.Service}}, nil, err
	})
	f.conn.Handle(link.MethodIntercepts, func(context.Context, json.RawMessage, []*os.File) (any, []*os.File, error) {
		return []api.Intercept{{Service: "of " + f.start.Options.Context}}, nil, nil
	})
}

func kept(t *testing.T, dir string) []string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "state", "intercepts", "*"))
	if err != nil {
		t.Fatal(err)
	}
	return files
}

func TestIntercepts(t *testing.T) {
	dir := workdir(t)
	c, _ := daemonOn(t, dir, nil)
	s := mustConnect(t, c, request("one", "has=shop"))
	var steps []string
	i, err := c.Intercept(t.Context(), api.InterceptRequest{Kind: api.KindExchange, Target: "shop"}, func(step string) { steps = append(steps, step) })
	if err != nil || i.Service != "shop[31m" || i.Ports[0].Name != "web" {
		t.Errorf("intercept: %+v, %v", i, err)
	}
	if !slices.Equal(steps, []string{"looking[31m at it"}) {
		t.Errorf("steps %q", steps)
	}
	if files := kept(t, dir); len(files) != 1 || !strings.HasSuffix(files[0], s.ID+".json") {
		t.Errorf("kept %v", files)
	} else if st, _ := os.Stat(files[0]); st.Mode().Perm() != 0o600 {
		t.Errorf("mode %v", st.Mode())
	}
	_, err = c.Intercept(t.Context(), api.InterceptRequest{Kind: api.KindExchange, Target: "error"}, nil)
	if e := asAPI(err); e.Code != api.CodeExists || e.Message != "taken[31m" || e.Hint != "x" {
		t.Errorf("a refused one: %+v", e)
	}
	_, err = c.Intercept(t.Context(), api.InterceptRequest{Kind: api.KindExchange, Target: "x", Wait: 1000 * time.Hour}, nil)
	if asAPI(err).Code != api.CodeUsage {
		t.Errorf("an endless wait: %v", err)
	}

	// The other session has no such intercept; the one that has ends it.
	mustConnect(t, c, request("two", "plan=10.97.0.0/16,10.245.0.0/16"))
	if list, err := c.Intercepts(t.Context()); err != nil || len(list) != 2 || list[0].Service != "of one" {
		t.Errorf("list: %+v, %v", list, err)
	}
	ended, err := c.Leave(t.Context(), api.LeaveRequest{Service: "shop"}, nil)
	if err != nil || len(ended) != 1 || ended[0].Service != "shop" {
		t.Errorf("leave: %+v, %v", ended, err)
	}
	if _, err := c.Leave(t.Context(), api.LeaveRequest{Service: "other"}, nil); asAPI(err).Code != api.CodeNotFound {
		t.Errorf("leaving what is not there: %v", err)
	}
	if files := kept(t, dir); len(files) != 0 {
		t.Errorf("kept %v", files)
	}
}

// Without a session nothing can be left, but recovered.
func TestLeaveAlone(t *testing.T) {
	c := testDaemon(t)
	_, err := c.Leave(t.Context(), api.LeaveRequest{Service: "shop"}, nil)
	if e := asAPI(err); e.Code != api.CodeNotFound || !strings.Contains(e.Message, `"shop"`) || !strings.Contains(e.Hint, "culvert recover shop") {
		t.Errorf("without a session: %+v", e)
	}
	_, err = c.Leave(t.Context(), api.LeaveRequest{All: true}, nil)
	if e := asAPI(err); e.Code != api.CodeNotFound || e.Hint != "culvert connect" {
		t.Errorf("all, without a session: %+v", e)
	}
}

// Whoever goes away while an intercept starts cancels it.
func TestInterceptCancelled(t *testing.T) {
	os.Remove("/run/home/alice/cancelled")
	c := testDaemon(t)
	mustConnect(t, c, request("cancel"))
	ctx, cancel := context.WithCancel(t.Context())
	started := make(chan struct{}, 1)
	done := make(chan error, 1)
	go func() {
		_, err := c.Intercept(ctx, api.InterceptRequest{Kind: api.KindExchange, Target: "hang"}, func(string) { started <- struct{}{} })
		done <- err
	}()
	<-started
	cancel()
	if err := <-done; err == nil {
		t.Error("a cancelled one has no error")
	}
	wait(t, "the session is told", func() bool { _, err := os.Stat("/run/home/alice/cancelled"); return err == nil })
}

// What daemon and session left when both were killed is undone at the daemon's
// next start, by a session of the same id, as often as it takes.
func TestRevert(t *testing.T) {
	os.Remove("/run/home/alice/reverted")
	dir := workdir(t)
	cmd := startDaemon(t, dir)
	c := api.New(filepath.Join(dir, "culvert.sock"))
	s := mustConnect(t, c, request("revert"))
	if _, err := c.Intercept(t.Context(), api.InterceptRequest{Kind: api.KindExchange, Target: "shop"}, nil); err != nil {
		t.Fatal(err)
	}
	cmd.Process.Signal(unix.SIGKILL)
	cmd.Wait()
	unix.Kill(s.PID, unix.SIGKILL)
	if err := os.WriteFile("/run/home/alice/cluster-away", nil, 0o644); err != nil {
		t.Fatal(err)
	}
	daemonOn(t, dir, nil)
	wait(t, "a session to revert", func() bool {
		text, _ := os.ReadFile("/run/home/alice/reverted")
		return string(text) == s.ID
	})
	time.Sleep(200 * time.Millisecond)
	if len(kept(t, dir)) != 1 {
		t.Error("forgotten although the cluster was away")
	}
	os.Remove("/run/home/alice/cluster-away")
	wait(t, "the record to go", func() bool { return len(kept(t, dir)) == 0 })
}
