package cluster

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/culvert-dev/culvert/test/cluster/internal/pki"
	"github.com/culvert-dev/culvert/test/cluster/internal/plan"
)

// keyWriter writes a cluster's keys and remembers the first error.
type keyWriter struct {
	dir string
	err error
}

func (w *keyWriter) fail(err error) {
	if w.err == nil {
		w.err = err
	}
}

func (w *keyWriter) write(name string, mode os.FileMode, content []byte) {
	if w.err != nil {
		return
	}
	if err := os.WriteFile(filepath.Join(w.dir, name), content, mode); err != nil {
		w.fail(fmt.Errorf("write key file: %w", err))
	}
}

func (w *keyWriter) authority(file, name string) *pki.Authority {
	a, err := pki.NewAuthority(name)
	if err != nil {
		w.fail(err)
		return nil
	}
	w.write(file+".crt", 0o600, a.Cert)
	w.write(file+".key", 0o600, a.Key)
	return a
}

func (w *keyWriter) issue(a *pki.Authority, r pki.Request) pki.Pair {
	if w.err != nil {
		return pki.Pair{}
	}
	p, err := a.Issue(r)
	if err != nil {
		w.fail(err)
	}
	return p
}

func (w *keyWriter) pair(a *pki.Authority, file string, r pki.Request) {
	p := w.issue(a, r)
	w.write(file+".crt", 0o600, p.Cert)
	w.write(file+".key", 0o600, p.Key)
}

func (w *keyWriter) kubeconfig(file string, mode os.FileMode, k pki.Kubeconfig) {
	if w.err != nil {
		return
	}
	b, err := k.Encode()
	if err != nil {
		w.fail(err)
		return
	}
	w.write(file+".kubeconfig", mode, b)
}

// writeKeys makes all certificates and kubeconfigs of a cluster.
func (s *Site) writeKeys(c *plan.Cluster) error {
	dir := s.PKIDir(c.Name)
	users := filepath.Dir(s.Kubeconfig(c.Name, ""))
	for d, mode := range map[string]os.FileMode{dir: 0o700, users: 0o755} {
		if err := os.MkdirAll(d, mode); err != nil {
			return fmt.Errorf("make a key directory: %w", err)
		}
	}
	w := &keyWriter{dir: dir}
	ca := w.authority("ca", "kubernetes-ca")
	front := w.authority("front-proxy-ca", "front-proxy-ca")
	etcd := w.authority("etcd-ca", "etcd-ca")
	hosts := []string{"127.0.0.1", "::1", "localhost", plan.APIName(c), "kubernetes", "kubernetes.default",
		"kubernetes.default.svc", "kubernetes.default.svc." + c.Domain}
	hosts = append(append(hosts, c.CP.Addrs.Strings()...), c.FirstSvc.Strings()...)
	w.pair(ca, "apiserver", pki.Request{CommonName: "kube-apiserver", Hosts: hosts})
	w.pair(ca, "apiserver-kubelet-client", pki.Request{CommonName: "kube-apiserver-kubelet-client"})
	w.pair(front, "front-proxy-client", pki.Request{CommonName: "front-proxy-client"})
	w.pair(etcd, "etcd", pki.Request{CommonName: "etcd", Hosts: []string{"127.0.0.1", "localhost"}})
	w.pair(etcd, "apiserver-etcd-client", pki.Request{CommonName: "kube-apiserver-etcd-client"})
	private, public, err := pki.SigningKey()
	if err != nil {
		return err
	}
	w.write("sa.key", 0o600, private)
	w.write("sa.pub", 0o600, public)
	if w.err != nil {
		return w.err
	}
	config := func(file, name string, orgs ...string) {
		w.kubeconfig(file, 0o600, pki.Kubeconfig{Server: c.Server(), CA: ca.Cert, Context: c.Context, User: name,
			Client: w.issue(ca, pki.Request{CommonName: name, Organizations: orgs})})
	}
	config("controller-manager", "system:kube-controller-manager")
	config("scheduler", "system:kube-scheduler")
	config("kube-proxy", "system:kube-proxy")
	for _, n := range c.Nodes {
		config("kubelet-"+n.Name, "system:node:"+n.Name, "system:nodes")
		w.pair(ca, "kubelet-"+n.Name+"-server", pki.Request{CommonName: "system:node:" + n.Name,
			Organizations: []string{"system:nodes"}, Hosts: append(n.Addrs.Strings(), n.Name)})
	}
	w.dir = users
	s.writeUsers(w, c, ca)
	return w.err
}

// Users are the kubeconfigs that a person, or a test, may use.
var Users = []string{"admin", "developer", "limited", "execuser", "nobody", "expired"}

// writeUsers makes the users' kubeconfigs. They may be read by anyone: tests
// run as ordinary users, and the cluster is thrown away.
func (s *Site) writeUsers(w *keyWriter, c *plan.Cluster, ca *pki.Authority) {
	developers := []string{"developers"}
	for name, r := range map[string]pki.Request{
		"admin":     {CommonName: "kubernetes-admin", Organizations: []string{"system:masters"}},
		"developer": {CommonName: "developer", Organizations: developers},
		"limited":   {CommonName: "limited"},
		"nobody":    {CommonName: "nobody"},
		"expired":   {CommonName: "developer", Organizations: developers, Expired: true},
		"execuser":  {CommonName: "execuser", Organizations: developers},
	} {
		k := pki.Kubeconfig{Server: c.Server(), CA: ca.Cert, Context: c.Context, User: name, Client: w.issue(ca, r)}
		if name == "developer" || name == "limited" || name == "execuser" {
			k.Namespace = "demo"
		}
		if name == "execuser" {
			k.Plugin = s.writePlugin(w, k.Client)
		}
		w.kubeconfig(name, 0o644, k)
	}
}

// writePlugin makes an exec plugin: a program that prints a client
// certificate. It leaves a trace in its user's home and in /tmp, and fails
// where it cannot, as the real ones do.
func (s *Site) writePlugin(w *keyWriter, p pki.Pair) string {
	credential, err := pki.ExecCredential(p)
	if err != nil {
		w.fail(err)
		return ""
	}
	w.write("execuser.credential.json", 0o644, credential)
	script := strings.Join([]string{
		"#!/bin/sh", "set -e",
		"date >> \"$HOME/.culvert-exec-plugin\"",
		"date >> \"/tmp/culvert-exec-plugin-$(id -u)\"",
		"exec cat '" + filepath.Join(w.dir, "execuser.credential.json") + "'", "",
	}, "\n")
	w.write("execuser-plugin", 0o755, []byte(script))
	return filepath.Join(w.dir, "execuser-plugin")
}
