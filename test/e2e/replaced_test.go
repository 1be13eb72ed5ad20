//go:build e2e

package e2e

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/test/netlab"
)

// TestAgentReplaced: whatever ends the agent, the session goes on with another
// one at the same addresses. Only the connections that lived in the old one end,
// by a reset and as soon as there is a new one, also those in which a program
// only waits. Datagrams and pings go on, and what is dialled meanwhile waits.
func TestAgentReplaced(t *testing.T) {
	s := connect(t, "--debug")
	for name, end := range map[string]func(*testing.T, api.Session){
		"pod deleted": func(t *testing.T, s api.Session) {
			kubectl(t, "-n", s.Agent.Namespace, "delete", "pod", s.Agent.Pod, "--wait=false")
		},
		"pod evicted": func(t *testing.T, s api.Session) {
			eviction := fmt.Sprintf(`{"apiVersion":"policy/v1","kind":"Eviction","metadata":{"name":%q,"namespace":%q}}`, s.Agent.Pod, s.Agent.Namespace)
			r := lab.Kubectl("", strings.NewReader(eviction), "create", "--raw", fmt.Sprintf("/api/v1/namespaces/%s/pods/%s/eviction", s.Agent.Namespace, s.Agent.Pod), "-f", "-")
			if r.Code != 0 {
				t.Fatal(r)
			}
		},
		"node drained": func(t *testing.T, s api.Session) {
			t.Cleanup(func() { kubectl(t, "uncordon", s.Agent.Node) })
			kubectl(t, "drain", s.Agent.Node, "--ignore-daemonsets", "--delete-emptydir-data", "--force", "--pod-selector=app.kubernetes.io/managed-by=culvert", "--timeout=30s")
		},
		"Deployment deleted": func(t *testing.T, s api.Session) {
			deployment := kubectl(t, "-n", s.Agent.Namespace, "get", "deployment", "-l", "culvert.dev/session="+s.ID, "-o", "name")
			kubectl(t, "-n", s.Agent.Namespace, "delete", deployment, "--wait=false")
		},
		// As the kernel does it when the memory is full: the pod stays.
		"container killed": killAgent,
	} {
		t.Run(name, func(t *testing.T) { replaceAgent(t, s, end) })
	}
	now := waitState(t, netlab.Alice, api.Connected, 10*time.Second)
	if now.PID != s.PID || now.Device != s.Device || fmt.Sprint(now.Addresses) != fmt.Sprint(s.Addresses) {
		t.Errorf("want the same process and addresses, have %+v after %+v", now, s)
	}
	sh(t, "getent hosts echo.demo")
}

// killAgent is kill -9 of the agent's process.
func killAgent(t *testing.T, s api.Session) {
	t.Helper()
	killPod(t, s.Agent.Namespace, s.Agent.Pod)
}

// killPod is kill -9 of a culvert-agent's process, in whatever role, and waits until
// it is dead; its pod stays.
func killPod(t *testing.T, namespace, pod string) {
	t.Helper()
	f := words(t, "-n", namespace, "get", "pod", pod, "-o", "jsonpath={.metadata.uid} {.spec.nodeName}")
	r := lab.Cluster("exec", "--inside", f[1], "--", "sh", "-c", fmt.Sprintf(
		`for p in $(pgrep -x culvert-agent); do if grep -q %q /proc/$p/cgroup; then kill -9 $p && echo killed; while kill -0 $p 2>/dev/null; do sleep 0.01; done; fi; done`, f[0]))
	if !strings.Contains(r.Stdout, "killed") {
		t.Fatalf("finding the process of %s: %v", pod, r)
	}
}

// outage dials addr again and again, and after stop tells when nothing was
// answered for the longest time.
func outage(t *testing.T, addr string) (stop func() (from, to time.Time)) {
	var mu sync.Mutex
	answered := []time.Time{time.Now()}
	done := make(chan struct{})
	var all sync.WaitGroup
	all.Go(func() {
		tick := time.NewTicker(50 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-done:
				return
			case <-tick.C:
			}
			all.Go(func() {
				c, err := within(t, "tcp", addr, 2*time.Second)
				if err != nil {
					return
				}
				defer c.Close()
				if tryEcho(c, []byte("new"), 2*time.Second) == nil {
					mu.Lock()
					answered = append(answered, time.Now())
					mu.Unlock()
				}
			})
		}
	})
	return func() (from, to time.Time) {
		close(done)
		all.Wait()
		for i := range len(answered) - 1 {
			if answered[i+1].Sub(answered[i]) > to.Sub(from) {
				from, to = answered[i], answered[i+1]
			}
		}
		return from, to
	}
}

func replaceAgent(t *testing.T, first api.Session, end func(*testing.T, api.Session)) {
	s := waitState(t, netlab.Alice, api.Connected, 10*time.Second)
	ip := podIPs(t)[0]
	addr := net.JoinHostPort(ip, "9000")
	waiting := dial(t, "tcp", addr)
	echo(t, waiting, []byte("first"))
	datagrams := dial(t, "udp", net.JoinHostPort(ip, "9001"))
	echo(t, datagrams, []byte("first"))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	pings := make(chan netlab.Result, 1)
	go func() { pings <- netlab.Run(lab.Command(ctx, netlab.Root, "ping", "-n", "-i", "0.2", ip)) }()
	type outcome struct {
		at  time.Time
		err error
	}
	// A program that sends nothing and waits for an answer.
	ended := make(chan outcome, 1)
	go func() {
		waiting.SetDeadline(time.Now().Add(90 * time.Second))
		_, err := waiting.Read(make([]byte, 1))
		ended <- outcome{time.Now(), err}
	}()
	stop := outage(t, addr)
	end(t, s)
	// Those that are dialled on the way succeed later: a SYN comes again.
	dialled := make(chan error, 5)
	go func() {
		for range cap(dialled) {
			go func() {
				c, err := within(t, "tcp", addr, time.Minute)
				if err == nil {
					c.Close()
				}
				dialled <- err
			}()
			time.Sleep(300 * time.Millisecond)
		}
	}()
	o := <-ended
	for range cap(dialled) {
		if err := <-dialled; err != nil {
			t.Errorf("dialled while the agent was replaced: %v", err)
		}
	}
	fresh(t, 20*time.Second)
	from, to := stop()
	late := o.at.Sub(to)
	t.Logf("without an agent for %v; the connection that waited was reset %v after that", to.Sub(from).Round(time.Millisecond), late.Round(time.Millisecond))
	if to.Sub(from) > 3*time.Second {
		t.Logf("from %v to %v\nlogs: %v", from.UTC(), to.UTC(), lab.Culvert(netlab.Alice, "logs"))
	}
	if !errors.Is(o.err, syscall.ECONNRESET) || late > time.Second || o.at.Before(from) {
		t.Errorf("a connection that lived in the old agent ended with %v, %v after there was a new one\nlogs: %v", o.err, late, lab.Culvert(netlab.Alice, "logs"))
	}
	echo(t, datagrams, []byte("the same socket"))
	cancel()
	lines := strings.Split((<-pings).Stdout, "\n")
	last, sent := 0, 0
	for _, l := range lines {
		fmt.Sscanf(l, "64 bytes from "+ip+": icmp_seq=%d", &last)
		fmt.Sscanf(l, "%d packets transmitted", &sent)
	}
	if last < sent-2 {
		t.Errorf("of %d pings the last answered one is %d", sent, last)
	}
	if now := waitState(t, netlab.Alice, api.Connected, 10*time.Second); now.PID != first.PID {
		t.Errorf("process %d, was %d", now.PID, first.PID)
	}
}

// TestNodeLost: the agent's node dies without a word. The cluster takes most of
// a minute to believe it; then there is another agent on another node, and a Service
// that was exchanged comes to the machine again, by the gate that is left.
func TestNodeLost(t *testing.T) {
	s := connect(t, "--debug")
	alice := developer{lab, netlab.Alice}
	alice.serve(t, "127.0.0.1")
	alice.intercept(t, "exchange", "echo", "--expose", "8080:http", "-n", "demo")
	exchanged := "http://" + serviceIPs(t)[0] + "/who"
	ip := kubectl(t, "-n", "demo", "get", "pods", "-l", "app=echo", "--field-selector=spec.nodeName!="+s.Agent.Node, "-o", "jsonpath={.items[0].status.podIP}")
	addr := net.JoinHostPort(ip, "9000")
	waiting := dial(t, "tcp", addr)
	echo(t, waiting, []byte("first"))
	ended := make(chan error, 1)
	go func() {
		waiting.SetDeadline(time.Now().Add(3 * time.Minute))
		_, err := waiting.Read(make([]byte, 1))
		ended <- err
	}()
	pid := root(t, "cat "+filepath.Join("/var/lib", netlab.Lab()+"-testcluster", "a", s.Agent.Node, "pid"))
	t.Cleanup(func() {
		if r := lab.Cluster("up"); r.Code != 0 {
			t.Errorf("mending the node: %v", r)
		}
		if _, err := lab.LoadImage(); err != nil { // the new node has none
			t.Errorf("mending the node: %v", err)
		}
	})
	begun := time.Now()
	root(t, "kill -KILL "+pid)
	select {
	case err := <-ended:
		t.Logf("the connection ended after %v", time.Since(begun).Round(time.Second))
		if !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("the connection that lived in the lost agent: %v", err)
		}
	case <-time.After(2 * time.Minute):
		t.Fatalf("no other agent after 2 minutes: %+v\nlogs: %v", status(t, netlab.Alice), lab.Culvert(netlab.Alice, "logs"))
	}
	c := dial(t, "tcp", addr)
	echo(t, c, []byte("new"))
	if now := waitState(t, netlab.Alice, api.Connected, 10*time.Second); now.Agent.Node == s.Agent.Node {
		t.Errorf("the agent is still on %s", now.Agent.Node)
	}
	eventually(t, 30*time.Second, func() error {
		for range 6 { // whichever gate the Service chooses
			r := lab.Run(netlab.Alice, "/bin/sh", "-c", "curl -sS --max-time 3 "+exchanged)
			if r.Code != 0 || !strings.HasPrefix(r.Stdout, "alice ") {
				return fmt.Errorf("the exchanged Service: %v", r)
			}
		}
		return nil
	})
	t.Logf("the machine serves the exchanged Service again %v after its node was lost", time.Since(begun).Round(time.Second))
}
