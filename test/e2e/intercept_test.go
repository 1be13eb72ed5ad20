//go:build e2e

package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/test/netlab"
)

// failOpen is how long traffic may take to find another server, with a margin for
// a machine that also runs the cluster.
const failOpen = 3*time.Second + 500*time.Millisecond

// developer is somebody at a machine.
type developer struct {
	*netlab.Machine
	user netlab.User
}

// aliceAt is Alice at the laptop, who starts from a shop that is as its owner wants it.
func aliceAt(t *testing.T) developer {
	t.Helper()
	openShop(t)
	return developer{lab, netlab.Alice}
}

// culvert runs the CLI with what a first command in the shop needs, unless it is
// among the arguments.
func (d developer) culvert(args ...string) netlab.Result {
	return netlab.Run(d.command(context.Background(), args...))
}

func (d developer) command(ctx context.Context, args ...string) *exec.Cmd {
	config, err := lab.Kubeconfig("", "developer")
	if err != nil {
		panic(err) // the cluster is gone: nothing can be tested
	}
	cut := slices.Index(args, "--")
	if cut < 0 {
		cut = len(args)
	}
	var more []string
	if !slices.Contains(args[:cut], "--kubeconfig") {
		more = append(more, "--kubeconfig", config)
	}
	if !slices.Contains(args[:cut], "-n") {
		more = append(more, "-n", "shop")
	}
	if slices.Contains([]string{"connect", "exchange", "mesh", "preview", "expose"}, args[0]) {
		more = append(more, "--image", image)
	}
	return d.Command(ctx, d.user, filepath.Join(d.Dir, "bin/culvert"), slices.Concat(args[:cut], more, args[cut:])...)
}

// connect joins the shop and leaves it at the end of the test, with which
// everything has to be as before.
func (d developer) connect(t *testing.T, flags ...string) {
	t.Helper()
	if r := d.culvert(append([]string{"connect"}, flags...)...); r.Code != 0 {
		t.Fatalf("connect: %v\nlogs: %v\ndaemon:\n%s", r, d.Culvert(d.user, "logs"), d.Tail(40))
	}
	t.Cleanup(func() { d.disconnect(t) })
}

func (d developer) disconnect(t *testing.T) {
	t.Helper()
	if r := d.Culvert(d.user, "disconnect"); r.Code != 0 {
		t.Errorf("disconnect: %v", r)
	}
	if t.Failed() {
		t.Logf("logs: %v\ndaemon:\n%s", d.Culvert(d.user, "logs"), d.Tail(40))
	}
}

// intercept starts one and ends it with the test.
func (d developer) intercept(t *testing.T, args ...string) api.Intercept {
	t.Helper()
	r := d.culvert(append(args, "-o", "json")...)
	i, err := lastJSON[api.Intercept](r.Stdout)
	if r.Code != 0 || err != nil {
		t.Fatalf("culvert %v: %v, %v\nlogs: %v\ndaemon:\n%s", args, err, r, d.Culvert(d.user, "logs"), d.Tail(20))
	}
	t.Cleanup(func() {
		if i.Service == "" || i.Namespace != "shop" {
			d.leave(t, "--all")
			return
		}
		// That one only: a test may have others for longer. It may have ended before.
		if r := d.culvert("leave", i.Service); r.Code != 0 {
			t.Logf("culvert leave %s: %s", i.Service, strings.TrimSpace(r.Stderr))
		}
	})
	if i.State != api.InterceptActive {
		t.Errorf("culvert %v: %+v", args, i)
	}
	t.Logf("culvert %v: %v", args, r.Took.Round(10*time.Millisecond))
	return i
}

// leave ends intercepts. That there is none any more is not an error of the test.
func (d developer) leave(t *testing.T, args ...string) {
	t.Helper()
	r := d.culvert(append([]string{"leave"}, args...)...)
	if r.Code != 0 && !slices.Contains(args, "--all") {
		t.Errorf("culvert leave %v: %v", args, r)
	}
	if r.Took > time.Second {
		t.Logf("culvert leave %v: %v", args, r.Took.Round(10*time.Millisecond))
	}
}

// pid is the process of the developer's session; 0 while there is none.
func (d developer) pid() int {
	r := d.Culvert(d.user, "status", "-o", "json")
	var all []api.Session
	if err := json.Unmarshal([]byte(r.Stdout), &all); err != nil || len(all) == 0 {
		return 0
	}
	return all[0].PID
}

// lastJSON reads the last value of what a command printed, which is its result:
// others may stand before it.
func lastJSON[T any](stdout string) (v T, err error) {
	values := json.NewDecoder(strings.NewReader(stdout))
	var last json.RawMessage
	for {
		var value json.RawMessage
		if err := values.Decode(&value); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return v, fmt.Errorf("%w in %q", err, stdout)
		}
		last = value
	}
	if last == nil {
		return v, errors.New("nothing was printed")
	}
	return v, json.Unmarshal(last, &v)
}

// program is a developer's own server.
type program struct {
	cmd    *exec.Cmd
	exited chan struct{}
}

// serve starts a testapp under the developer's name that listens at an address
// of his machine, until the test ends.
func (d developer) serve(t *testing.T, on string, flags ...string) *program {
	t.Helper()
	p := &program{exited: make(chan struct{})}
	p.cmd = d.Command(context.Background(), d.user, d.Testapp(), append([]string{"serve", "--name", d.user.Name, "--on", on}, flags...)...)
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		_ = p.cmd.Wait()
		close(p.exited)
	}()
	t.Cleanup(p.stop)
	to := map[string]string{"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}[on]
	if to == "" {
		to = on
	}
	eventually(t, 5*time.Second, func() error {
		return d.Inside(func() error {
			c, err := net.DialTimeout("tcp", net.JoinHostPort(to, "8080"), time.Second)
			if err == nil {
				c.Close()
			}
			return err
		})
	})
	return p
}

// stop is kill -9.
func (p *program) stop() {
	_ = p.cmd.Process.Kill() // it may have ended
	<-p.exited
}

// answeredBy waits until a server answers new connections to a port of the shop's
// Service cart.
func answeredBy(t *testing.T, name string, within time.Duration) time.Duration {
	t.Helper()
	begun := time.Now()
	addr := clusterIP(t, "cart") + ":80"
	eventually(t, within, func() error {
		got, _, err := whoAnswers(clients[0], "http", addr)
		if err == nil && !serves(got, name) {
			err = fmt.Errorf("%s answers, not %s", got, name)
		}
		return err
	})
	return time.Since(begun)
}

// gates are the gates' pods of the shop.
func gates(t *testing.T) []string {
	t.Helper()
	return words(t, "-n", "shop", "get", "pods", "-l", "app.kubernetes.io/name=culvert-gate", "-o", "jsonpath={.items[*].metadata.name}")
}

// nobodyLeft waits until the shop holds nothing of an earlier test, and returns
// what is in it.
func nobodyLeft(t *testing.T) []string {
	t.Helper()
	eventually(t, 60*time.Second, func() error {
		if left := kubectl(t, "-n", "shop", "get", "deployments,replicasets,pods,services,configmaps,leases,poddisruptionbudgets,networkpolicies", "-l", "app.kubernetes.io/managed-by=culvert", "-o", "name"); left != "" {
			return &leftError{left}
		}
		return nil
	})
	return listNamespace(t, "shop")
}
